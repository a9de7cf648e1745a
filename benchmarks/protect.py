"""What a child forgets of one parent's classes while it learns the other's (`make bench-protect`).

Two parents of disjoint classes are fused into one child that knows the first parent's classes; it
is then trained on the labels of the others' alone, with the answers on the first's protected at
several energies.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import random_parent, settle, write
from kept import Figures, Kept, average, kept_parser, spread
from plots import Line, Panel, draw
from torch import Tensor, nn
from variants import seeded
from zoo import some_classes

from slimfuse.data import Split
from slimfuse.diagnose.curvature import difference, forecast, measured
from slimfuse.diagnose.isolation import Protection, subspaces
from slimfuse.finetune.distill import Loss, labels_loss
from slimfuse.finetune.loop import best_precision, fit
from slimfuse.finetune.schedule import Schedule
from slimfuse.pipeline.answering import reading
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-protect")
SEEDS = (0, 1, 2)
ENERGIES = (None, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999, 0.99999, 1.0)
SHARES = (0.1, 0.25, 0.5, 0.75)
STEPS, PROTECTED, HELD_OUT = 300, 256, 1000
TEMPERATURE, REPLAY = 2.0, "{seed}: replay"
BOTH = "{hardness: 1.0, temperature: 2.0}"


@dataclass(frozen=True)
class Plan:
    """The size of a run: steps on the new task, protected images, images of each test."""

    steps: int
    protected: int
    test: int | None


class Bench:
    """One seed: the child that knows the old task, and both tasks' images."""

    def __init__(self, seed: int, threads: int, plan: Plan, small: bool) -> None:
        quiet()
        if small:  # random parents: the machinery alone
            low = high = random_parent(RECIPE, seed, OUT / "random")
            names: tuple[str, ...] = (
                "data.limit.train=400", "data.limit.test=100", "data.calibration.samples=64",
                "finetune={epochs: 0}",
            )  # fmt: skip
        else:
            low, high = some_classes(seed, 0), some_classes(seed, 5)
            names = (f"finetune.distill={BOTH}", "finetune.epochs=0.2")
        shared = (
            f"parents=[{{name: low, from: {low}}}, {{name: high, from: {high}}}]", "baselines=[]",
            *seeded(seed, threads), *names,
        )  # fmt: skip
        self.seed, self.plan, self.out = seed, plan, OUT / f"seed-{seed}"
        job = prepare(load_recipe(RECIPE, shared), RECIPE)
        store = Store(self.out)
        with store.lock():
            folder = Stages(job, store).finetune("fused").path
        self.start = job.family.load(folder, attention="eager")
        self.task, self.read = job.task, reading(job.task)
        old, new = (_part(job.data.train, first) for first in (0, 5))
        tests = [_part(job.data.test, first) for first in (0, 5)]
        judged = tests[0].sample(HELD_OUT, 1)
        if plan.test is not None:
            tests = [s.sample(plan.test, 0) for s in tests]
        self.samples = job.task.samples(new, job.processor)
        kept = job.task.samples(old.sample(plan.protected, seed), job.processor)
        self.tests = [job.task.samples(s, job.processor) for s in tests]
        self.protected = kept
        self.chunks = [kept[c] for c in torch.arange(len(kept)).split(64)]
        held = job.task.samples(judged, job.processor)
        self.pairs = [job.task.examples(held, c) for c in torch.arange(len(held)).split(64)]

    def both(self, model: nn.Module) -> Figures:
        """Return the share of right answers on the old and the new task's test images."""
        return {"old": accuracy(model, self.tests[0]), "new": accuracy(model, self.tests[1])}

    def trained(self, energy: float | None) -> Figures:
        """Return what a child keeps and learns, in per cent; None: nothing is protected.

        Of the free one also by how far it goes from the start, by the share of the way.
        """
        model, protection = copy.deepcopy(self.start), None
        if energy is not None:
            spaces = subspaces(self.start, lambda: self.chunks, energy=energy)
            protection = Protection(model, spaces)
        self.fit(model, self.loss, f"energy {energy}", protection)
        told = forecast(self.start, self.pairs, difference(self.start, model), "classes", self.read)
        rise, _, _ = measured(self.start, model, self.pairs, "classes", self.read)
        _, _, most = measured(
            self.start, model, [(c, torch.zeros(len(c)).long()) for c in self.chunks],
            "classes", self.read,
        )  # fmt: skip
        plasticity = 100.0 if protection is None else 100 * protection.plasticity
        found = self.both(model) | {
            "plasticity": plasticity, "largest change": most, "rise": rise.value,
            "forecast": told.total.value,
        }  # fmt: skip
        return found if protection is not None else found | self.between(model)

    def loss(self, model: nn.Module, indices: Tensor) -> Tensor:
        """Return the loss against the new task's labels."""
        return labels_loss(self.task, lambda i: self.task.examples(self.samples, i))(model, indices)

    def fit(
        self, model: nn.Module, loss: Loss, what: str, protection: Protection | None = None
    ) -> None:
        """Train a model on the new task."""
        file = self.out / "training.safetensors"
        file.unlink(missing_ok=True)
        fit(
            model, loss, len(self.samples), Schedule(self.plan.steps, 64, 5e-4, seed=self.seed),
            precision=best_precision(), checkpoint=file, what=what, constraint=protection,
        )  # fmt: skip
        file.unlink()

    def replayed(self) -> Figures:
        """Return what a child keeps and learns that is taught its old answers on the same images.

        Each step sees 64 of the protected images beside 64 new ones: twice the work.
        """
        model, generator = copy.deepcopy(self.start), torch.Generator().manual_seed(self.seed)

        def loss(model: nn.Module, indices: Tensor) -> Tensor:
            draw = torch.randperm(len(self.protected), generator=generator)[: len(indices)]
            given = self.protected[draw].arguments
            with torch.no_grad():
                answers = self.start(**given).logits
            judge = self.task.criterion
            before = judge.combine([answers], [1.0], TEMPERATURE)
            told = judge.taught(model(**given).logits, before, TEMPERATURE)
            return self.loss(model, indices) + told

        self.fit(model, loss, "replay")
        return self.both(model)

    def between(self, model: nn.Module) -> Figures:
        """Return what the weights between the start's and a model's know, by the share of it."""
        found: Figures = {}
        for share in SHARES:
            mixed = copy.deepcopy(self.start)
            with torch.no_grad():
                for own, other in zip(mixed.parameters(), model.parameters(), strict=True):
                    own.lerp_(other, share)
            found |= {f"{key} {share:g}": value for key, value in self.both(mixed).items()}
        return found


def _part(split: Split, first: int) -> Split:
    labels = np.asarray(split.labels)
    return split.take(np.flatnonzero((labels >= first) & (labels < first + 5)))


@torch.no_grad()
def accuracy(model: nn.Module, samples: Tensor) -> float:
    """Return the share of right answers over all ten classes, in per cent."""
    right = 0
    for chunk in torch.arange(len(samples)).split(256):
        inputs = samples[chunk]
        rows = model(**inputs.arguments).logits
        right += int((rows.argmax(1) == samples.labels[chunk]).sum())
    return 100 * right / len(samples)


def main() -> None:
    """Measure what is asked for; write the table and the picture once all is there."""
    parser = kept_parser(SEEDS, __doc__)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    small = arguments.quick
    plan = Plan(4, 16, 50) if small else Plan(STEPS, PROTECTED, None)
    file = OUT / ("quick.json" if small else "found.json")
    kept = Kept(file, asdict(plan), fresh=arguments.fresh)
    for seed in arguments.seeds:
        bench = Bench(seed, arguments.threads, plan, small)
        kept.row(f"{seed}: before", lambda b=bench: b.both(b.start))
        for energy in ENERGIES:
            kept.row(row_of(energy).format(seed=seed), lambda e=energy, b=bench: b.trained(e))
        kept.row(REPLAY.format(seed=seed), bench.replayed)
    if small or any(REPLAY.format(seed=s) not in kept.rows for s in SEEDS):
        return
    write("protect", kept.record(SEEDS), page(kept))
    picture(kept)
    settle(claims(kept))


def row_of(energy: float | None) -> str:
    """Return the name of an energy's row, the seed left open."""
    return "{seed}: free" if energy is None else f"{{seed}}: energy {energy:g}"


def page(kept: Kept) -> str:
    """Return the table."""
    lines = [
        "| what is protected | may still move % | old task % | new task % | largest change of a "
        "protected logit | rise of the old loss | its forecast |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def cell(name: str, key: str, digits: int = 1) -> str:
        return spread(kept.over(SEEDS, name, key), digits)

    before = "{seed}: before"
    lines.append(f"| before the new task | | {cell(before, 'old')} | {cell(before, 'new')} | | | |")
    for energy in ENERGIES:
        name = row_of(energy)
        cells = [cell(name, key) for key in ("plasticity", "old", "new")]
        cells += [cell(name, key, 2) for key in ("largest change", "rise", "forecast")]
        title = "nothing" if energy is None else f"energy {energy:g}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for share in SHARES:
        cells = [cell(row_of(None), f"{key} {share:g}") for key in ("old", "new")]
        told = f"control: {share:.0%} of the way from before to nothing protected"
        lines.append(f"| {told} | | {' | '.join(cells)} | | | |")
    cells = [cell(REPLAY, key) for key in ("old", "new")]
    told = "control: the old answers on the protected images in every step's loss"
    lines.append(f"| {told} | | {' | '.join(cells)} | | | |")
    return "\n".join(
        [
            "# What a child forgets, and what protecting its answers costs",
            "",
            "Fashion-MNIST, parents 128 wide and 6 deep on classes 0–4 and 5–9, fused to 64 wide "
            "and taught by both without labels for a fifth of an epoch; then "
            f"{STEPS} steps on the labels of classes 5–9 alone. {PROTECTED} images of classes 0–4 "
            f"are protected. {len(SEEDS)} seeds, ± half the 95 % interval (Student's t); old and "
            "new: test images of classes 0–4 and 5–9, over all ten answers; rise (nats) and "
            f"forecast on {HELD_OUT} test images. The first control needs no protected images: "
            "every weight is that share of the way. Made by `make bench-protect`.",
            "",
            *lines,
            "",
            f"Machine: {kept.machine()}",
            "",
        ]
    )


def picture(kept: Kept) -> None:
    """Draw the old task over the new one: the dial's line, and the control's."""

    def line(title: str, names: list[tuple[str, str]], style: str) -> Line:
        points = [
            [average(kept.over(SEEDS, name, f"{key}{more}")) for name, more in names]
            for key in ("new", "old")
        ]
        return Line(title, points[0], points[1], style)

    ends = ("{seed}: before", ""), (row_of(None), "")
    dial = [(row_of(e), "") for e in ENERGIES]
    ways = [ends[0], *((row_of(None), f" {share:g}") for share in SHARES), ends[1]]
    draw(
        "protect",
        [
            Panel(
                "300 steps on classes 5–9", "new task (classes 5–9), %", "old task (0–4), %",
                [line("protected answers, energy 0 to 1", dial, "o-"),
                 line("weights between before and after", ways, "s--"),
                 line("old answers taught on the same images", [(REPLAY, "")], "^")],
            )
        ],
    )  # fmt: skip


def claims(kept: Kept) -> dict[str, bool]:
    """Return what the table shows or not."""

    def old(name: str) -> float:
        return average(kept.over(SEEDS, name, "old"))

    found = {
        f"more energy, more of the old task is kept: {second:g}": old(row_of(second))
        > old(row_of(first))
        for first, second in pairwise(ENERGIES)
        if second is not None
    }
    whole = kept.over(SEEDS, row_of(1.0), "largest change")
    return found | {"at full energy no protected logit moves by a hundredth": max(
        whole.values()) < 0.01}  # fmt: skip


if __name__ == "__main__":
    main()
