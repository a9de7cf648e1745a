"""Half-width digits ViT, five seeds, all controls at one budget (`make bench-digits`)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

from common import accuracy, machine, parent_folder, random_parent, settle, single, write
from variants import interval

from slimfuse.finetune.schedule import steps_of
from slimfuse.pipeline import compress

RECIPE = Path("recipes/vit/digits.yaml")
OUT = Path("runs/bench-digits")
SEEDS = (0, 1, 2, 3, 4)
TEST_IMAGES = 599


def one(seed: int) -> dict[str, float]:
    """Return the accuracies of one seed, in per cent."""
    seeds = (
        f"parents.0.train.seed={2 * seed}", f"parents.1.train.seed={2 * seed + 1}",
        f"finetune.seed={seed}", f"runtime.seed={seed}",
        "bench.min_seconds=0.1", "bench.threads=[1]", "bench.batch=[1]", "gates=[]",
    )  # fmt: skip
    out = OUT / f"seed-{seed}"
    both = compress(RECIPE, overrides=(*seeds, "baselines=[random, subclone]"), out=out / "both")
    parents = {name: accuracy(both, name) for name in ("a", "b")}
    best = max(parents, key=lambda name: parents[name])
    tail = seeds[2:]
    alone = single(RECIPE, tail, parent_folder(both, best), out / "best-parent")
    untrained = random_parent(RECIPE, 1000 + seed, out / "untrained")
    chance = single(RECIPE, (*tail, "finetune.epochs=0"), untrained, out / "random-parent")
    return {
        **{f"parent {name}": value for name, value in parents.items()},
        "better parent": parents[best],
        "fused": accuracy(both, "fused"),
        "fused, better parent only": accuracy(alone, "fused"),
        "fused, random-weight parent": accuracy(chance, "fused"),
        "finetuned": accuracy(both, "finetuned"),
        "finetuned, better parent only": accuracy(alone, "finetuned"),
        "finetuned, subclone start": accuracy(both, "subclone"),
        "finetuned, random start": accuracy(both, "random-start"),
        "onnx-int8": accuracy(both, "onnx-int8"),
    }


def main() -> None:
    """Run all seeds and write the table."""
    from slimfuse.recipe import load_recipe

    recipe = load_recipe(RECIPE)
    train = recipe.parents[0].train
    assert train is not None
    parent_steps = steps_of(599, train.epochs, train.batch_size)
    child_steps = steps_of(1198, recipe.finetune.epochs, recipe.finetune.batch_size)
    runs = [one(seed) for seed in SEEDS]
    table = {k: [r[k] for r in runs] for k in runs[0]}
    lines = [
        "# Digits: two 64-wide ViTs trained on different halves, fused into one 32-wide",
        "",
        f"{len(SEEDS)} seeds, {TEST_IMAGES} test images (one image is 0.17 points); a parent takes "
        f"{parent_steps} steps, the child {child_steps} ({child_steps / parent_steps:.0%}). "
        "Made by `make bench-digits`.",
        "",
        "| model | mean % | sd | per seed |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in table.items():
        each = ", ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {name} | {mean(values):.1f} | {stdev(values):.1f} | {each} |")
    ahead = [r["finetuned"] - r["finetuned, better parent only"] for r in runs]
    lines += [
        "",
        f"Fused from both over fused from the better parent alone, finetuned, paired by seed: "
        f"{mean(ahead):+.2f} ± {interval(ahead):.2f} points (95 %, Student's t).",
    ]
    lines += ["", "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]
    write(
        "digits",
        {"accuracy": table, "steps": {"parent": parent_steps, "child": child_steps},
         "machine": machine()},
        "\n".join(lines),
    )  # fmt: skip
    settle(
        {
            "the child takes at most 20 % of a parent's steps": child_steps <= 0.2 * parent_steps,
            "every seed: finetuned within 2 points of the better parent": all(
                r["finetuned"] >= r["better parent"] - 2 for r in runs
            ),
            "every seed: at least 10 points above the random start": all(
                r["finetuned"] >= r["finetuned, random start"] + 10 for r in runs
            ),
            "every seed: a random-weight parent scores like chance (below 20 %)": all(
                r["fused, random-weight parent"] < 20 for r in runs
            ),
        }
    )


if __name__ == "__main__":
    main()
