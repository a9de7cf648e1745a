"""Starts and short trainings of one recipe's variants, over seeds, each measured once and kept."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy.stats import t

from slimfuse.pipeline.common import Part
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store
from slimfuse.tasks import Evidence, Samples

Table = dict[str, list[float]]


def parsed(seeds: Sequence[int]) -> argparse.Namespace:
    """Return the command line's seeds and threads, and set the threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=seeds)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def seeded(seed: int, threads: int) -> tuple[str, ...]:
    """Return the overrides that give a run its own random choices."""
    keys = ("runtime.seed", "finetune.seed", "data.calibration.seed")
    return (f"runtime.threads={threads}", "gates=[]", *(f"{key}={seed}" for key in keys))


def measure(
    recipe: Path,
    shared: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    budgets: Mapping[str, Sequence[int]],
    out: Path,
    *,
    with_parents: bool = True,
    shared_samples: dict[Part, Samples] | None = None,
) -> dict[str, float]:
    """Return test accuracies in per cent: `name, n steps` for every variant and budget.

    shared, variants: overrides of the recipe; budgets: steps by variant name ("" for all others).
    shared_samples: prepared splits of an earlier call on the same data, and for the next one.
    """
    quiet()
    pixels: dict[Part, Samples] = {} if shared_samples is None else shared_samples
    found: dict[str, float] = {}
    store = Store(out)
    store.check_ours()
    for name, changes in variants.items():
        for steps in budgets.get(name, budgets[""]):
            base = load_recipe(recipe, (*shared, *changes))
            job = prepare(base, recipe)
            per_epoch = -(-len(job.data.train) // base.finetune.batch_size)
            more = f"finetune.epochs={steps / per_epoch!r}"
            job = prepare(load_recipe(recipe, (*shared, *changes, more)), recipe)
            torch.set_num_threads(job.threads)
            with store.lock():
                stages = Stages(job, store, pixels)
                if with_parents:
                    for p in job.parents:
                        found[f"parent {p.name}"] = accuracy(stages, stages.outputs(p).test)
                stage = stages.finetune("fused") if steps else stages.start("fused")
                label = f"{name}, {steps} steps" if steps else f"{name}, one-shot"
                found[label] = accuracy(stages, stages.evidence(stage))
            print(f"{out.name}: {label}: {found[label]:.2f}", flush=True)
    return found


def accuracy(stages: Stages, evidence: Evidence) -> float:
    """Return the test accuracy of what a model says, in per cent."""
    return 100 * stages.figures(evidence)["accuracy"].value


def rows(runs: Sequence[Mapping[str, float]]) -> tuple[Table, list[str]]:
    """Return the figures by name, and the lines of a table with 95 % intervals over the runs."""
    table: Table = {name: [r[name] for r in runs] for name in runs[0]}
    lines = ["| model | mean % | ± (95 %) | per seed |", "| --- | --- | --- | --- |"]
    for name, values in table.items():
        half = f"{interval(values):.1f}" if len(values) > 1 else ""
        each = ", ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {name} | {mean(values):.1f} | {half} | {each} |")
    return table, lines


def interval(values: Sequence[float]) -> float:
    """Return half the 95 % interval of a mean, Student's t."""
    n = len(values)
    return float(t.ppf(0.975, n - 1)) * stdev(values) / n**0.5
