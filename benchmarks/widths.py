"""Parents of different widths that know different classes, fused into one (`make bench-widths`).

A ViT 128 wide knows five classes of Fashion-MNIST, one 96 wide the other five; their child is 64
wide and answers over all ten without having seen a label.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import settle, write
from kept import Figures, Kept, ahead, clear, kept_parser, spread
from transformers import AutoConfig, AutoModelForImageClassification
from variants import measure, seeded
from zoo import some_classes

from slimfuse.families import Shape
from slimfuse.pipeline.common import Part
from slimfuse.tasks import Samples

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-widths")
SEEDS, STEPS = (0, 1, 2), 250
MIDDLE = Shape(96, 4, 192, 6)
BOTH = "fused from both"
NOISE = "control: fused from the 128 wide and a random-weight 96 wide"
WAYS = {
    BOTH: ("fuse.parents=[low, high]",),
    "fused from the 128 wide alone": ("fuse.parents=[low]",),
    "fused from the 96 wide alone": ("fuse.parents=[high]",),
    NOISE: ("fuse.parents=[low, noise]",),
    "random start": ("fuse.method=random",),
}
PARENTS = {"the 128 wide parent": "low", "the 96 wide parent": "high"}


class Bench:
    """One seed: its parents and what all its rows share."""

    def __init__(self, seed: int, arguments: argparse.Namespace) -> None:
        low, high = some_classes(seed, 0), some_classes(seed, 5, shape=MIDDLE)
        self.out = OUT / f"seed-{seed}"
        noise = untrained(high, seed, self.out / "noise")
        self.shared = (
            f"parents=[{{name: low, from: {low}}}, {{name: high, from: {high}}}, "
            f"{{name: noise, from: {noise}}}]",
            *seeded(seed, arguments.threads),
            "finetune.distill={teachers: [low, high], hardness: 1.0, temperature: 2.0}",
        )  # fmt: skip
        self.samples: dict[Part, Samples] = {}

    def way(self, name: str) -> Figures:
        """Return a child's test accuracies in per cent, by steps, and the parents' with them."""
        found = measure(
            RECIPE, (*self.shared, *WAYS[name]), {"x": ()}, {"": (0, STEPS)}, self.out,
            with_parents=name == BOTH, shared_samples=self.samples,
        )  # fmt: skip
        return {key.removeprefix("x, "): value for key, value in found.items()}


def untrained(folder: Path, seed: int, out: Path) -> Path:
    """Save a model of a folder's configuration with random weights, and its processor."""
    torch.manual_seed(1000 + seed)
    model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_bytes(
        (folder / "preprocessor_config.json").read_bytes()
    )
    return out.resolve()


def main() -> None:
    """Measure what is asked for; write the table once all seeds are there."""
    arguments = kept_parser(SEEDS, __doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    kept = Kept(OUT / "found.json", {"steps": STEPS, "recipe": str(RECIPE)}, fresh=arguments.fresh)
    for seed in arguments.seeds:
        bench = Bench(seed, arguments)
        for name in WAYS:
            kept.row(f"{seed}: {name}", lambda n=name, b=bench: b.way(n))
    if any(f"{seed}: {name}" not in kept.rows for seed in SEEDS for name in WAYS):
        return

    def over(name: str, key: str) -> dict[int, float]:
        return kept.over(SEEDS, f"{{seed}}: {name}", key)

    heads = ("one-shot", f"{STEPS} steps")
    lines = [
        "# Two parents of different widths that know five classes each", "",
        "Fashion-MNIST: parents 128 wide (feed-forward 256) on classes 0–4 and 96 wide (192) on "
        "classes 5–9, both 6 deep; the child is 64 wide (128), a plain ViT. Every child is taught "
        f"by the calibrated union of both parents on unlabelled images (hardness 1) for {STEPS} "
        f"steps. 10,000 test images over ten classes, in % ± half the 95 % interval over "
        f"{len(SEEDS)} seeds (Student's t), each with parents of its own; behind, the lead of "
        f"`{BOTH}`, paired by seed. A subclone and structured pruning "
        "need a parent that knows all classes, an average one width. Made by `make "
        "bench-widths`.", "",
        f"| model | {' | '.join(heads)} |", "| --- | --- | --- |",
    ]  # fmt: skip
    lines += [
        f"| {title} | {spread(over(BOTH, f'parent {name}'))} | |" for title, name in PARENTS.items()
    ]
    claims = {}
    for name in WAYS:
        cells = []
        for head in heads:
            own, found = over(BOTH, head), over(name, head)
            told = f" ({ahead(own, found)})" if name != BOTH else ""
            cells.append(spread(found) + told)
            if name != BOTH:
                claims[f"{BOTH} is above {name}, {head}"] = clear(own, found) == ">"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Machine: {kept.machine()}", ""]
    write("widths", kept.record(SEEDS), "\n".join(lines))
    settle(claims)


if __name__ == "__main__":
    main()
