"""Parents of disjoint classes, fused over all ten without labels (`make bench-knowledge`)."""

from __future__ import annotations

from pathlib import Path

from common import machine, settle, write
from variants import measure, parsed, rows, seeded
from zoo import some_classes

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-knowledge")
SEEDS = (0, 1, 2)
STEPS = 250
TEST_IMAGES = 10_000


def one(seed: int, threads: int) -> dict[str, float]:
    """Return one seed's accuracies over ten classes, in per cent."""
    low, high = some_classes(seed, 0), some_classes(seed, 5)
    shared = (
        f"parents=[{{name: low, from: {low}}}, {{name: high, from: {high}}}]",
        *seeded(seed, threads), "finetune.distill={hardness: 1.0, temperature: 2.0}",
    )  # fmt: skip
    return measure(
        RECIPE,
        shared,
        {
            "fused from both": (),
            "fused from low alone": ("fuse.parents=[low]",),
            "fused from high alone": ("fuse.parents=[high]",),
            "random start": ("fuse.method=random",),
        },
        {"": (0, STEPS), "random start": (STEPS,)},
        OUT / f"seed-{seed}",
    )


def main() -> None:
    """Run the seeds and write the table."""
    arguments = parsed(SEEDS)
    runs = [one(seed, arguments.threads) for seed in arguments.seeds]
    if len(runs) < len(SEEDS):
        return
    table, lines = rows(runs)
    text = [
        "# Two parents that know five classes each, fused over all ten without labels",
        "",
        "Fashion-MNIST, parents 128 wide and 6 deep trained on classes 0–4 and 5–9, child 64 "
        f"wide; {len(SEEDS)} seeds, {TEST_IMAGES:,} test images over ten classes. Every child is "
        f"taught by the calibrated union of both parents for {STEPS} steps on unlabelled images "
        "(hardness 1). Made by `make bench-knowledge`.",
        "",
        *lines,
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]
    write("knowledge", {"accuracy": table, "machine": machine()}, "\n".join(text))
    after = f"{STEPS} steps"
    others = [f"fused from low alone, {after}", f"fused from high alone, {after}",
              f"random start, {after}", "parent low", "parent high"]  # fmt: skip
    settle(
        {
            f"one-shot, every seed: above either parent's child: {name}": all(
                a > b for a, b in zip(table["fused from both, one-shot"], table[name], strict=True)
            )
            for name in ("fused from low alone, one-shot", "fused from high alone, one-shot")
        }
        | {
            f"after {after}, every seed: above {name}": all(
                a > b for a, b in zip(table[f"fused from both, {after}"], table[name], strict=True)
            )
            for name in others
        }
    )


if __name__ == "__main__":
    main()
