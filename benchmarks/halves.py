"""Two parents on different halves of a small training set (`make bench-halves`)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from common import machine, settle, write
from variants import interval, measure, parsed, rows, seeded

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-halves")
SEEDS = (0, 1, 2, 3, 4)
IMAGES, STEPS = 2000, 300
TEST_IMAGES = 10_000
BOTH, BETTER = "fused from both", "fused from the better parent alone"


def one(seed: int, threads: int) -> dict[str, float]:
    """Return one seed's accuracies, in per cent; the better parent is so on the test set."""
    shared = (
        *seeded(seed, threads), f"data.limit.train={IMAGES}", "data.calibration.samples=512",
        *(f"parents.{i}.train.{key}" for i in (0, 1) for key in
          (f"shard={i + 1}/2", "epochs=20", "batch_size=32", f"seed={2 * seed + i}")),
    )  # fmt: skip
    variants = {BOTH: ()} | {
        f"fused from {p} alone": (f"fuse.parents=[{p}]", f"finetune.distill.teachers=[{p}]")
        for p in ("a", "b")
    }
    found = measure(RECIPE, shared, variants, {"": (0, STEPS)}, OUT / f"seed-{seed}")
    best = max("ab", key=lambda p: found[f"parent {p}"])
    when = ("one-shot", f"{STEPS} steps")
    alone = {f"{BETTER}, {w}": found[f"fused from {best} alone, {w}"] for w in when}
    both = {f"{BOTH}, {w}": found[f"{BOTH}, {w}"] for w in when}
    return {"parent a": found["parent a"], "parent b": found["parent b"]} | both | alone


def main() -> None:
    """Run the seeds and write the table."""
    arguments = parsed(SEEDS)
    runs = [one(seed, arguments.threads) for seed in arguments.seeds]
    if len(runs) < len(SEEDS):
        return
    table, lines = rows(runs)
    leads = {}
    for when in ("one-shot", f"{STEPS} steps"):
        pairs = zip(table[f"{BOTH}, {when}"], table[f"{BETTER}, {when}"], strict=True)
        leads[when] = [a - b for a, b in pairs]
    text = [
        "# Two parents on different halves of a small training set",
        "",
        f"Fashion-MNIST, {IMAGES:,} training images, {IMAGES // 2:,} for each parent (128 wide, 6 "
        f"deep, 20 epochs); child 64 wide, {STEPS} steps on all of them, taught by the parents "
        f"that it is fused from. {len(SEEDS)} seeds of training on the same images, "
        f"{TEST_IMAGES:,} test images. Made by `make bench-halves`.",
        "",
        *lines,
        "",
        *(f"Both over the better parent alone, {when}, paired by seed: {mean(lead):+.2f} ± "
          f"{interval(lead):.2f} points (95 %, Student's t)." for when, lead in leads.items()),
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]  # fmt: skip
    write("halves", {"accuracy": table, "machine": machine()}, "\n".join(text))
    lead = leads[f"{STEPS} steps"]
    claim = f"both parents' child above the better parent's alone after {STEPS} steps (95 %)"
    settle({claim: mean(lead) > interval(lead)})


if __name__ == "__main__":
    main()
