"""What a child forgets of one parent's classes while it learns the other's (`make bench-protect`).

Two parents of disjoint classes are fused into one child that knows the first parent's classes; it
is then trained on the labels of the others' alone, with the answers on the first's protected at
several energies.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from common import machine, write
from torch import Tensor, nn
from variants import interval, seeded
from zoo import some_classes

from slimfuse.data import Split
from slimfuse.diagnose.curvature import difference, forecast, measured
from slimfuse.diagnose.isolation import Protection, subspaces
from slimfuse.finetune.distill import labels_loss
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
ENERGIES = (None, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
STEPS, PROTECTED, HELD_OUT = 300, 256, 1000
BOTH = "{hardness: 1.0, temperature: 2.0}"


@dataclass(frozen=True)
class Plan:
    """The size of a run: steps on the new task, protected images, images of each test."""

    steps: int
    protected: int
    test: int | None


def one(seed: int, threads: int, plan: Plan, small: bool) -> list[dict[str, float]]:
    """Return what each energy keeps and learns, in per cent of its task's test images."""
    quiet()
    if small:  # random parents: the machinery alone
        from common import random_parent

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
    job = prepare(load_recipe(RECIPE, shared), RECIPE)
    store = Store(OUT / f"seed-{seed}")
    with store.lock():
        stages = Stages(job, store)
        folder = stages.finetune("fused").path
        start = job.family.load(folder, attention="eager")
    old, new = (_part(job.data.train, first) for first in (0, 5))
    old_test, new_test = (_part(job.data.test, first) for first in (0, 5))
    if plan.test is not None:
        old_test, new_test = (s.sample(plan.test, 0) for s in (old_test, new_test))
    samples = job.task.samples(new, job.processor)
    kept = job.task.samples(old.sample(plan.protected, seed), job.processor)
    loss = labels_loss(job.task, lambda i: job.task.examples(samples, i))
    tests = [job.task.samples(s, job.processor) for s in (old_test, new_test)]
    chunks = [kept[c] for c in torch.arange(len(kept)).split(64)]
    judged = job.task.samples(old_test.sample(HELD_OUT, 1), job.processor)
    pairs = [job.task.examples(judged, c) for c in torch.arange(len(judged)).split(64)]
    found = []
    for energy in ENERGIES:
        model = copy.deepcopy(start)
        protection = None
        if energy is not None:
            spaces = subspaces(start, lambda: chunks, energy=energy)
            protection = Protection(model, spaces)
        file = OUT / f"seed-{seed}" / "training.safetensors"
        file.unlink(missing_ok=True)
        fit(
            model, loss, len(samples), Schedule(plan.steps, 64, 5e-4, seed=seed),
            precision=best_precision(), checkpoint=file, what=f"energy {energy}",
            constraint=protection,
        )  # fmt: skip
        file.unlink()
        read = reading(job.task)
        told = forecast(start, pairs, difference(start, model), "classes", read)
        rise, _, _ = measured(start, model, pairs, "classes", read)
        _, _, most = measured(start, model, [(c, torch.zeros(len(c)).long()) for c in chunks],
                              "classes", read)  # fmt: skip
        row = {
            "energy": -1.0 if energy is None else energy,
            "plasticity": 100.0 if protection is None else 100 * protection.plasticity,
            "old": accuracy(model, tests[0]), "new": accuracy(model, tests[1]),
            "largest change": most, "rise": rise.value, "forecast": told.total.value,
        }  # fmt: skip
        print(seed, row, flush=True)
        found.append(row)
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
    """Run the seeds and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a smoke test: random parents")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = Plan(4, 16, 50) if arguments.small else Plan(STEPS, PROTECTED, None)
    runs = [one(seed, arguments.threads, plan, arguments.small) for seed in arguments.seeds]
    if arguments.small or len(runs) < len(SEEDS):
        return
    lines = [
        "| energy | plasticity % | old task % | new task % | largest change of a protected logit | "
        "rise of the old loss | its forecast |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for place, energy in enumerate(ENERGIES):
        rows = [run[place] for run in runs]
        shown = [
            f"{mean(r[key] for r in rows):.1f} ± {interval([r[key] for r in rows]):.1f}"
            for key in ("plasticity", "old", "new")
        ]
        rest = [
            f"{mean(r[key] for r in rows):.2g}" for key in ("largest change", "rise", "forecast")
        ]
        name = "free" if energy is None else f"{energy:g}"
        lines.append(f"| {name} | {' | '.join((*shown, *rest))} |")
    text = [
        "# What a child forgets, and what protecting its answers costs",
        "",
        "Fashion-MNIST, parents 128 wide and 6 deep on classes 0–4 and 5–9, fused to 64 wide and "
        "taught by both without labels for a fifth of an epoch; then "
        f"{STEPS} steps on the labels of classes 5–9 alone. {PROTECTED} images of classes 0–4 are "
        f"protected. {len(SEEDS)} seeds, ± 95 % (Student's t); old and new: test images of classes "
        f"0–4 and 5–9, over all ten answers; rise and forecast on {HELD_OUT} test images. Made by "
        "`make bench-protect`.",
        "",
        *lines,
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]
    write("protect", {"runs": runs, "machine": machine()}, "\n".join(text))


if __name__ == "__main__":
    main()
