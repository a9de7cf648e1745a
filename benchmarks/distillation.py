"""What hidden states through the fusion's maps teach beside answers (`make bench-distillation`).

Every start is finetuned on labels alone, on the parents' answers (and labels), and on answers and
hidden states, each at two budgets. A row is kept as soon as it is measured, so that families and
seeds may run one after the other; whoever runs the last piece writes the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import machine, write
from kept import Kept, ahead, spread

from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store
from slimfuse.tasks import Samples

OUT = Path("runs/bench-distillation")
SEEDS = (0, 1, 2)
STEPS = (300, 1000)
STARTS = {"fused": "refit", "random-start": "random start"}
WEIGHTS = (0.3, 1.0, 3.0, 10.0)
CHOSEN = 1.0
TAUGHT: dict[str, tuple[str, ...]] = {
    "labels": ("finetune.distill.hardness=0",),
    "answers": (),
    "answers and hidden states": (f"finetune.distill.hidden={CHOSEN}",),
}
BEST = list(TAUGHT)[-1]


@dataclass(frozen=True)
class Case:
    """A family: its recipe, what is changed in it, and what a seed is.

    parents: of a seed, as a recipe writes them; train: training samples, few enough that every
    budget sees them several times, so that what the parents say is kept.
    """

    title: str
    recipe: Path
    seeds: str
    train: int
    test: int
    batch: int
    changes: tuple[str, ...] = ()


CASES: Mapping[str, Case] = {
    "vit": Case(
        "ViT 6 × 128 → 64, Fashion-MNIST", Path("recipes/vit/fashion-mnist.yaml"),
        "pairs out of three trained parents, calibration draws and orders of finetuning",
        train=10_000, test=5_000, batch=64,
    ),
    "minilm": Case(
        "MiniLM-L6 384 → 192, WordNet glosses", Path("recipes/bert/wordnet-minilm.yaml"),
        "calibration draws and orders of finetuning for one pair of fine-tuned parents",
        train=9_000, test=3_000, batch=32,
    ),
}  # fmt: skip


def parents(kind: str, seed: int, arguments: argparse.Namespace) -> str:
    """Return the two parents of a seed; those of texts are fine-tuned where they aren't yet."""
    zoo = arguments.runs.resolve() / "zoo"
    if kind == "vit":
        folders = [zoo / f"fashion-{(seed + i) % 3}-a" for i in range(2)]
        if not all(f.is_dir() for f in folders):
            raise SystemExit(f"no parents in {zoo}: run benchmarks/zoo.py fashion:0, :1 and :2")
    else:
        recipe, store = CASES[kind].recipe, Store(OUT / f"{kind}-parents")
        starts = (f"parents.{i}.train.start={zoo / 'minilm'}" for i in range(2))
        changes = (*starts, f"runtime.threads={arguments.threads}")
        stages = Stages(prepare(load_recipe(recipe, changes), recipe), store)
        with store.lock():
            folders = [stages.parent(p)[0].resolve() for p in stages.job.parents]
    named = (f"{{name: {n}, from: {f}}}" for n, f in zip("ab", folders, strict=True))
    return f"parents=[{', '.join(named)}]"


class Bench:
    """One family and seed."""

    def __init__(self, kind: str, seed: int, arguments: argparse.Namespace) -> None:
        self.case, self.seed = CASES[kind], seed
        self.store = Store(OUT / f"{kind}-{seed}")
        self.shared: dict[str, Samples] = {}
        self.changes = (
            parents(kind, seed, arguments), f"runtime.threads={arguments.threads}",
            f"runtime.seed={seed}", f"data.calibration.seed={seed}", f"finetune.seed={seed}",
            "baselines=[]", "gates=[]",
            "data.calibration.samples=1024", f"data.limit.train={self.case.train}",
            f"data.limit.test={self.case.test}", f"finetune.batch_size={self.case.batch}",
            *self.case.changes,
        )  # fmt: skip

    def stages(self, steps: int, more: Sequence[str] = ()) -> Stages:
        """Return the stages of a budget."""
        per_epoch = -(-self.case.train // self.case.batch)
        changes = (*self.changes, f"finetune.epochs={steps / per_epoch!r}", *more)
        job = prepare(load_recipe(self.case.recipe, changes), self.case.recipe)
        found = Stages(job, self.store, self.shared)  # type: ignore[arg-type]
        self.shared = found.shared  # type: ignore[assignment]
        assert found.tuning.schedule.steps == steps
        return found

    def measured(self, start: str, steps: int, more: Sequence[str] = ()) -> dict[str, float]:
        """Return the child's test accuracy in per cent."""
        stages = self.stages(max(steps, 1), more)
        with self.store.lock():
            stage = stages.finetune(start) if steps else stages.start(start)
            figures = stages.figures(stages.evidence(stage))
        return {"accuracy": 100 * figures["accuracy"].value}

    def parent(self, name: str) -> dict[str, float]:
        """Return a parent's test accuracy in per cent."""
        stages = self.stages(STEPS[-1])
        parent = next(p for p in stages.job.parents if p.name == name)
        with self.store.lock():
            figures = stages.figures(stages.outputs(parent).test)
        return {"accuracy": 100 * figures["accuracy"].value}


def row(kind: str, start: str, steps: int, taught: str) -> str:
    """Return the name of a row, the seed left open."""
    return f"{kind} {{seed}}: {start}, {steps} steps, {taught}"


def measure(kept: Kept, kind: str, seed: int, arguments: argparse.Namespace) -> None:
    """Measure what is asked for of one family and seed."""
    bench = Bench(kind, seed, arguments)
    for name in "ab":
        kept.row(f"{kind} {seed}: parent {name}", lambda n=name: bench.parent(n))
    for start in STARTS:
        kept.row(
            row(kind, start, 0, "nothing").format(seed=seed), lambda s=start: bench.measured(s, 0)
        )
        for steps in STEPS:
            for taught, more in TAUGHT.items():
                name = row(kind, start, steps, taught).format(seed=seed)
                kept.row(name, lambda s=start, n=steps, m=more: bench.measured(s, n, m))
    if seed == SEEDS[0] and arguments.weights:
        for start in STARTS:
            for weight in WEIGHTS:
                name = row(kind, start, STEPS[0], f"weight {weight:g}").format(seed=seed)
                more = (f"finetune.distill.hidden={weight}",)
                kept.row(name, lambda s=start, m=more: bench.measured(s, STEPS[0], m))


def table(kept: Kept, kind: str) -> list[str]:
    """Return one family's table."""
    case = CASES[kind]

    def seen(name: str) -> str:
        return spread(kept.over(SEEDS, name, "accuracy"))

    seeds = [s for s in SEEDS if row(kind, "fused", STEPS[0], BEST).format(seed=s) in kept.rows]
    lines = [
        f"## {case.title}", "",
        f"{len(seeds)} seed(s): {case.seeds}. {case.train:,} training and {case.test:,} test "
        f"samples, {case.batch} a step. Parents: "
        f"{seen(f'{kind} {{seed}}: parent a')} and {seen(f'{kind} {{seed}}: parent b')} %.", "",
        f"| taught | {' | '.join(f'{t}, {n} steps' for t in STARTS.values() for n in STEPS)} |",
        f"| --- |{' ---: |' * (len(STARTS) * len(STEPS))}",
    ]  # fmt: skip
    before = [seen(row(kind, s, 0, "nothing")) for s in STARTS for _ in STEPS]
    lines.append(f"| nothing yet | {' | '.join(before)} |")
    for taught in TAUGHT:
        cells = [seen(row(kind, s, n, taught)) for s in STARTS for n in STEPS]
        lines.append(f"| {taught} | {' | '.join(cells)} |")
    gains = {}
    for start, title in STARTS.items():
        for steps in STEPS:
            best, other = (
                kept.over(seeds, row(kind, start, steps, t), "accuracy") for t in (BEST, "answers")
            )
            if len(best) > 1 and best.keys() == other.keys():
                gains[f"{title}, {steps} steps"] = ahead(best, other)
    if gains:
        told = "; ".join(f"{name} {gain}" for name, gain in gains.items())
        lines += ["", f"Hidden states beside answers alone, points, paired by seed: {told}."]
    weighed = {
        title: ", ".join(
            f"{w:g}: {found}"
            for w in WEIGHTS
            if (found := spread(kept.over(SEEDS[:1], row(kind, start, STEPS[0], f"weight {w:g}"),
                                          "accuracy")))
        )
        for start, title in STARTS.items()
    }  # fmt: skip
    if any(weighed.values()):
        told = "; ".join(f"{title}: {found}" for title, found in weighed.items() if found)
        lines += ["", f"Weights of the hidden states, {STEPS[0]} steps, seed 0: {told}."]
    if len(seeds) < len(SEEDS):
        lines += [
            "",
            "Unfinished: an empty cell is yet to be measured, one without ± has one seed.",
        ]
    return [*lines, ""]


def markdown(kept: Kept) -> list[str]:
    """Return the tables of what is there."""
    lines = [
        "# Distillation: labels, answers, hidden states through the fusion's maps", "",
        "Accuracy in %, mean ± half the 95 % interval over seeds (Student's t). Answers: the "
        "recipe's temperature 2 and hardness 0.9; hidden states: weight "
        f"{CHOSEN:g} beside them. A random start is taught them in the fusion's coordinates, "
        "turned to its own. Every budget has its own schedule. Made by "
        "`make bench-distillation`.", "",
    ]  # fmt: skip
    for kind in CASES:
        if any(name.startswith(f"{kind} ") for name in kept.rows):
            lines += table(kept, kind)
    return [*lines, "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]


def main() -> None:
    """Measure what is asked for, and write the tables of what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where parents lie")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", action="store_true", help="other weights, too, of seed 0")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(arguments.threads)
    conditions = {
        "weight": CHOSEN,
        "cases": {k: [c.train, c.test, c.batch] for k, c in CASES.items()},
    }
    kept = Kept(OUT / "found.json", conditions, fresh=arguments.fresh)
    for kind in arguments.families:
        for seed in arguments.seeds:
            measure(kept, kind, seed, arguments)
    data = {"rows": kept.rows, "conditions": conditions, "machine": machine(), "seeds": SEEDS}
    write("distillation", data, "\n".join(markdown(kept)))


if __name__ == "__main__":
    main()
