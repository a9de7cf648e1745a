"""Depth 6 → 3 and width 128 → 64 at once, against dropping layers alone (`make bench-depth`)."""

from __future__ import annotations

from pathlib import Path

from common import machine, settle, write
from variants import measure, parsed, rows, seeded
from zoo import fashion

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-depth")
SEEDS = (0, 1, 2)
STEPS = 300
TEST_IMAGES = 10_000
BOTH = "target={hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3}"
LAYERS = "target={hidden_size: 128, intermediate_size: 256, num_hidden_layers: 1}"


def one(seed: int, threads: int) -> dict[str, float]:
    """Return one seed's accuracies, in per cent."""
    shared = (
        f"parents=[{{name: a, from: {fashion(seed)}}}]", *seeded(seed, threads),
        "finetune.distill={temperature: 2.0, hardness: 0.9}",
    )  # fmt: skip
    return measure(
        RECIPE,
        shared,
        {
            "refit to 64 wide, 3 deep (105 k)": (BOTH,),
            "layers dropped to 128 wide, 1 deep (149 k)": (LAYERS, "fuse.method=select"),
            "layers refitted to 128 wide, 1 deep (149 k)": (LAYERS,),
            "random start, 64 wide, 3 deep (105 k)": (BOTH, "fuse.method=random"),
        },
        {"": (0, STEPS)},
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
        "# Depth and width at once against dropping layers alone",
        "",
        "Fashion-MNIST, one parent 128 wide and 6 deep (809 k parameters); to about equal "
        "parameters by both (64 wide, 3 deep: 105 k) and by depth alone (128 wide, 1 deep: 149 k, "
        f"the smallest that whole layers allow). {len(SEEDS)} seeds, {TEST_IMAGES:,} test images, "
        f"{STEPS} steps of distillation for all. Made by `make bench-depth`.",
        "",
        *lines,
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]
    write("depth", {"accuracy": table, "machine": machine()}, "\n".join(text))
    first, *others = [name.removesuffix(", one-shot") for name in table if "one-shot" in name]
    settle(
        {
            f"every seed: {first} above {other}, {when}": all(
                a > b for a, b in
                zip(table[f"{first}, {when}"], table[f"{other}, {when}"], strict=True)
            )
            for other in others
            for when in ("one-shot", f"{STEPS} steps")
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
