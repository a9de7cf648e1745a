"""How few samples and steps a narrow child needs (`make bench-efficiency`).

Two ViTs of Fashion-MNIST into one of half their width: calibration images without labels for a
refit, and passes over a small training set for a refit and a random start with the same teachers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import settle, write
from kept import Figures, Kept, average, kept_parser, spread
from parents import parent_folder
from plots import Line, Panel, draw
from quality import CASES, QUICK, RATES, SETTINGS
from variants import measure, seeded

from slimfuse.pipeline.common import Part
from slimfuse.tasks import Samples

OUT = Path("runs/bench-efficiency")
SEEDS = (0, 1, 2)
DEFAULT = 512  # calibration images of the finetuned rows
CALIBRATION = (16, 64, 256, DEFAULT, 1024, 4096)
EPOCHS = (0.25, 0.5, 1.0, 2.0, 3.0)
BATCH, TRAIN = 64, 8000
STARTS = {"refit of both": (), "random start": ("fuse.method=random",)}
RATE = {"refit of both": RATES[0], "random start": RATES[-1]}


def home(quick: bool) -> Path:
    """Return where rows are kept."""
    return OUT.with_name(f"{OUT.name}-quick") if quick else OUT


class Bench:
    """One seed: what all its rows share."""

    def __init__(self, seed: int, arguments: argparse.Namespace) -> None:
        case, runs = CASES["vit"], Path(arguments.runs)
        following = (seed + 1) % len(SEEDS)
        a, b = (parent_folder(runs, p.format(seed=seed, next=following)) for p in case.parents)
        self.recipe, self.out = case.recipe, home(arguments.quick) / str(seed)
        self.shared = (
            *seeded(seed, arguments.threads), *SETTINGS, *(QUICK if arguments.quick else ()),
            f"parents=[{{name: a, from: {a}}}, {{name: b, from: {b}}}]",
        )  # fmt: skip
        self.samples: dict[Part, Samples] = {}

    def child(self, changes: tuple[str, ...], steps: int) -> Figures:
        """Return a child's test accuracy in per cent."""
        found = measure(
            self.recipe, (*self.shared, *changes), {"child": ()}, {"": (steps,)}, self.out,
            with_parents=False, shared_samples=self.samples,
        )  # fmt: skip
        return {"accuracy": next(iter(found.values()))}


def rows_of() -> dict[str, tuple[tuple[str, ...], int]]:
    """Return every row's overrides and steps, by its name, the seed left open."""
    found: dict[str, tuple[tuple[str, ...], int]] = {
        f"{{seed}}: {n} calibration samples": ((f"data.calibration.samples={n}",), 0)
        for n in CALIBRATION
    }
    for name, changes in STARTS.items():
        for epochs in EPOCHS:
            steps = round(epochs * TRAIN / BATCH)
            more = (*changes, f"finetune.lr={RATE[name]!r}")
            found[f"{{seed}}: {name}, {epochs:g} epochs"] = (more, steps)
    return found


def main() -> None:
    """Measure what is asked for; write the table once all is there."""
    arguments = kept_parser(SEEDS, __doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    kept = Kept(home(quick) / "found.json", {"settings": SETTINGS}, fresh=arguments.fresh)
    rows = rows_of()
    if quick:
        rows = {name: (changes, min(steps, 2)) for name, (changes, steps) in rows.items()}
    for seed in arguments.seeds:
        bench = Bench(seed, arguments)
        for name, (changes, steps) in rows.items():
            kept.row(name.format(seed=seed), lambda c=changes, s=steps, b=bench: b.child(c, s))
    if quick or any(name.format(seed=seed) not in kept.rows for name in rows for seed in SEEDS):
        return
    found = {name: kept.over(SEEDS, name, "accuracy") for name in rows}
    shots = [found[f"{{seed}}: {n} calibration samples"] for n in CALIBRATION]
    untrained = shots[CALIBRATION.index(DEFAULT)]
    curves = {
        name: [found[f"{{seed}}: {name}, {e:g} epochs"] for e in EPOCHS] for name in STARTS
    }  # fmt: skip
    lines = [
        "# How few samples and steps", "", str(__doc__).strip(), "",
        "Accuracy in % on 5,000 test images, mean ± half the 95 % interval over three pairs "
        "(Student's t).", "",
        "| calibration images, no training | accuracy |", "| --- | --- |",
        *(f"| {n} | {spread(v)} |" for n, v in zip(CALIBRATION, shots, strict=True)), "",
        f"| epochs of {TRAIN:,} images | {' | '.join(STARTS)} |", "| --- | --- | --- |",
        f"| 0 | {spread(untrained)} | |",
        *(
            f"| {e:g} | " + " | ".join(spread(curves[n][i]) for n in STARTS) + " |"
            for i, e in enumerate(EPOCHS)
        ),
        "", f"Rates: {RATE}. Machine: {kept.machine()}", "",
    ]  # fmt: skip
    write("efficiency", kept.record(SEEDS), "\n".join(lines))
    draw(
        "efficiency",
        [
            Panel("calibration, no training", "images without labels", "accuracy, %",
                  [Line("refit", CALIBRATION, [average(v) for v in shots])], "x"),
            Panel("finetuning", f"epochs of {TRAIN} images", "accuracy, %",
                  [Line(n, EPOCHS, [average(v) for v in c]) for n, c in curves.items()]),
        ],
    )  # fmt: skip
    settle(
        {
            "256 images are within a point of 4 096": average(shots[-1]) - average(shots[2]) < 1,
            "a refit without training is above a random start's three epochs": average(untrained)
            > average(curves["random start"][-1]),
        }
    )


if __name__ == "__main__":
    main()
