"""The Fashion-MNIST recipe with its controls (`make bench-fashion-mnist`)."""

from __future__ import annotations

from pathlib import Path

from common import accuracy, machine, parent_folder, random_parent, row, settle, single, write

from slimfuse.finetune.schedule import steps_of
from slimfuse.pipeline import compress
from slimfuse.recipe import load_recipe

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/vit-fashion-mnist-half")
TEST_IMAGES, TRAIN_IMAGES = 10_000, 60_000


def main() -> None:
    """Run the recipe and its one-parent and random-parent controls, and write the table."""
    recipe = load_recipe(RECIPE)
    train = recipe.parents[0].train
    assert train is not None
    steps = steps_of(TRAIN_IMAGES, train.epochs, train.batch_size)
    child = steps_of(TRAIN_IMAGES, recipe.finetune.epochs, recipe.finetune.batch_size)
    both = compress(RECIPE, out=OUT)
    parents = {p.name: accuracy(both, p.name) for p in recipe.parents}
    best = max(parents, key=lambda name: parents[name])
    quick = ("bench.min_seconds=0.1", "bench.threads=[1]", "bench.batch=[1]")
    alone = single(RECIPE, quick, parent_folder(both, best), OUT / "best-parent")
    untrained = random_parent(RECIPE, 1000, OUT / "untrained")
    chance = single(RECIPE, (*quick, "finetune.epochs=0"), untrained, OUT / "random-parent")
    table = {
        **{f"parent {name} ({steps} steps)": value for name, value in parents.items()},
        "fused from both, one-shot": accuracy(both, "fused"),
        f"fused from {best}, one-shot": accuracy(alone, "fused"),
        "fused from a random-weight parent, one-shot": accuracy(chance, "fused"),
        f"both + {child} steps": accuracy(both, "finetuned"),
        f"{best} alone + {child} steps": accuracy(alone, "finetuned"),
        **{
            f"{r.name} + {child} steps": accuracy(both, r.name)
            for r in both.report.rows
            if r.stage == "baseline"
        },
        "ONNX float32": accuracy(both, "onnx"),
        "ONNX INT8": accuracy(both, "onnx-int8"),
    }
    lines = [
        "# Fashion-MNIST: two 128-wide ViTs fused into one 64-wide",
        "",
        f"One seed, {TEST_IMAGES:,} test images (95 % interval about ±0.65 points). "
        "Made by `make bench-fashion-mnist`.",
        "",
        "| model | accuracy % |",
        "| --- | --- |",
        *(f"| {name} | {value:.2f} |" for name, value in table.items()),
        "",
        "| speed-up of | over | threads | batch | p50 ratio (95 % interval) |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {s.other} | {s.base} | {s.threads} | {s.batch} | "
            f"{s.ratio:.2f} ({s.low:.2f} – {s.high:.2f}) |"
            for s in both.report.speedups
        ),
        "",
        "| p50 ms | threads | batch | p50 | p90 | p99 | calls |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r.name} | {x.threads} | {x.batch} | {x.p50_ms:.3f} | {x.p90_ms:.3f} | "
            f"{x.p99_ms:.3f} | {x.n} |"
            for r in both.report.rows
            for x in r.latency
        ),
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]
    speed = [
        s.ratio
        for s in both.report.speedups
        if (s.other, s.threads, s.batch) == ("onnx", 2, 1) and s.base == best
    ]
    write(
        "fashion-mnist",
        {"accuracy": table, "machine": machine(), "params": {
            r.name: r.params for r in (row(both, best), row(both, "finetuned"))}},
        "\n".join(lines),
    )  # fmt: skip
    settle(
        {
            "every parent reaches 88 %": min(parents.values()) >= 88,
            "one-shot from one parent keeps 90 % of its accuracy": accuracy(alone, "fused")
            >= 0.9 * parents[best],
            "the child takes at most 20 % of a parent's steps": child <= 0.2 * steps,
            "finetuned within 1 point of the better parent": accuracy(both, "finetuned")
            >= parents[best] - 1,
            "float32 ONNX at least 1.6 times faster (batch 1, 2 threads)": speed[0] >= 1.6,
            "a random-weight parent scores like chance": accuracy(chance, "fused") < 15,
        }
    )


if __name__ == "__main__":
    main()
