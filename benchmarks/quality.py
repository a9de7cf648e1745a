"""What every way to a model of half the width gives at equal budgets (`make bench-quality`).

A ViT on Fashion-MNIST and a BERT on WordNet. Every way has the same teachers, training samples and
steps, and the best of the same rates for it, chosen by the first seed's test set for all alike.
Each row is kept as soon as it is measured, so that `--tasks` and `--seeds` may run one after the
other.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import settle, write
from kept import Figures, Kept, ahead, average, clear, kept_parser, spread
from parents import BERT_TINY, parent_folder
from peers import torch_pruned
from variants import accuracy, measure, seeded

from slimfuse.pipeline.common import Part
from slimfuse.pipeline.job import prepare
from slimfuse.pipeline.run import quiet
from slimfuse.pipeline.sparse import thin
from slimfuse.pipeline.stages import Stages
from slimfuse.recipe import load_recipe
from slimfuse.store import Store
from slimfuse.tasks import Samples

OUT = Path("runs/bench-quality")
SEEDS, BUDGETS, RATES = (0, 1, 2), (150, 300), (5e-4, 1e-3, 2e-3)
SETTINGS = ("data.calibration.samples=512", "data.limit={train: 8000, test: 5000}", "gates=[]",
            "baselines=[]", "target={hidden_size: 0.5, intermediate_size: 0.5}")  # fmt: skip
QUICK = ("data.calibration.samples=64", "data.limit={train: 400, test: 200}")
OURS, OURS_ONE = "refit of both", "refit of the better one"
SUBCLONE, L1, TAYLOR = "subclone of the better one", "torch-pruning, L1", "torch-pruning, Taylor"
SELECT, RANDOM = "structured pruning by activations", "random start"
SPARSE = "unstructured WoodFisher, wide and as many weights"
WAYS = (OURS, OURS_ONE, SUBCLONE, SELECT, L1, TAYLOR, RANDOM, SPARSE)


@dataclass(frozen=True)
class Case:
    """A task: its recipe, its parents by seed, and the rates that every way tries."""

    title: str
    recipe: Path
    parents: tuple[str, ...]
    seeds: str
    rates: tuple[float, ...] = RATES


CASES = {
    "vit": Case(
        "ViT 6 × 128 to 6 × 64, Fashion-MNIST", Path("recipes/vit/fashion-mnist.yaml"),
        ("zoo/fashion-{seed}-a", "zoo/fashion-{next}-a"),
        "pairs of three parents, 0 1, 1 2 and 2 0, so that each stands in two of them",
    ),
    "bert": Case(
        "BERT-tiny 2 × 128 to 2 × 64, WordNet", Path("recipes/bert/wordnet-minilm.yaml"),
        BERT_TINY,
        "draws of calibration glosses and orders of finetuning for one pair of parents",
        (*RATES, 4e-3),
    ),
}  # fmt: skip


class Bench:
    """One task and seed: what all its rows share."""

    def __init__(self, kind: str, seed: int, arguments: argparse.Namespace, out: Path) -> None:
        self.case, self.out, runs = CASES[kind], out / f"{kind}-{seed}", Path(arguments.runs)
        following = (seed + 1) % len(SEEDS)
        a, b = (parent_folder(runs, p.format(seed=seed, next=following)) for p in self.case.parents)
        self.folders = {"a": a, "b": b}
        self.shared = (
            *seeded(seed, arguments.threads), *SETTINGS, *(QUICK if arguments.quick else ()),
            f"parents=[{{name: a, from: {a}}}, {{name: b, from: {b}}}]",
        )  # fmt: skip
        self.budgets = (2, 4) if arguments.quick else BUDGETS
        self.samples: dict[Part, Samples] = {}

    def parents(self) -> Figures:
        """Return the parents' test accuracies in per cent."""
        found = measure(
            self.case.recipe, (*self.shared, "fuse.method=random"), {"x": ()}, {"": (0,)},
            self.out, shared_samples=self.samples,
        )  # fmt: skip
        return {p: found[f"parent {p}"] for p in "ab"}

    def way(self, name: str, rate: float, better: str) -> Figures:
        """Return test accuracies in per cent by steps of training at one rate."""
        if name == SPARSE:
            return self.sparse(rate, better)
        found = measure(
            self.case.recipe, (*self.shared, f"finetune.lr={rate!r}"),
            {"x": self.overrides(name, better)}, {"": (0, *self.budgets)}, self.out,
            with_parents=False, shared_samples=self.samples,
        )  # fmt: skip
        return dict(zip(map(str, (0, *self.budgets)), found.values(), strict=True))

    def overrides(self, name: str, better: str) -> tuple[str, ...]:
        """Return what makes the recipe one of the ways."""
        one = f"fuse.parents=[{better}]"
        plain = {
            OURS: (), OURS_ONE: (one,), SUBCLONE: ("fuse.method=subclone", one),
            SELECT: ("fuse.method=select", one), RANDOM: ("fuse.method=random",),
        }  # fmt: skip
        if name in plain:
            return plain[name]
        how = "L1" if name == L1 else "Taylor"
        quiet()
        job = prepare(load_recipe(self.case.recipe, self.shared), self.case.recipe)
        store = Store(self.out)
        with store.lock():
            stages = Stages(job, store, self.samples)
            folder = torch_pruned(stages, self.folders[better], how, self.out / f"pruned-{how}")
        a, b = self.folders["a"], self.folders["b"]
        return (
            f"parents=[{{name: a, from: {a}}}, {{name: b, from: {b}}}, {{name: pruned, from: "
            f"{folder}}}]", "fuse={method: keep, parents: [pruned]}", "target={}",
            "finetune.distill.teachers=[a, b]",
        )  # fmt: skip

    def sparse(self, rate: float, better: str) -> Figures:
        """Return the figures of the better parent with as many weights as the narrow child."""
        quiet()
        narrow = prepare(load_recipe(self.case.recipe, self.shared), self.case.recipe)
        parent, child = (
            sum(p.numel() for n, p in narrow.family.build(c).named_parameters() if counted(n, p))
            for c in (next(p.config for p in narrow.parents if p.name == better), narrow.target)
        )
        found = {}
        for steps in (0, *self.budgets):
            per_epoch = math.ceil(len(narrow.data.train) / narrow.recipe.finetune.batch_size)
            changes = (
                *self.shared, f"finetune.lr={rate!r}", "target={}",
                f"fuse={{method: keep, parents: [{better}]}}", "finetune.epochs=0",
                f"sparsify={{sparsity: {1 - child / parent:.4f}, controls: [], "
                f"epochs: {steps / per_epoch!r}}}",
            )  # fmt: skip
            job = prepare(load_recipe(self.case.recipe, changes), self.case.recipe)
            store = Store(self.out)
            with store.lock():
                stages = Stages(job, store, self.samples)
                spec = job.recipe.sparsify
                assert spec is not None
                made = thin(stages, stages.start("fused"), spec, {}, lambda *_: None)
                found[str(steps)] = accuracy(stages, stages.evidence(made.child.stage))
            print(f"{self.out.name}: {SPARSE}, {steps} steps: {found[str(steps)]:.2f}", flush=True)
        return found


def counted(name: str, parameter: torch.nn.Parameter) -> bool:
    """Return whether a parameter is one of those that zeros are made in: layers' weights."""
    return parameter.ndim > 1 and "embedding" not in name


def name_of(kind: str, way: str, rate: float) -> str:
    """Return the name of a row, the seed left open."""
    return f"{kind} {{seed}}: {way}, rate {rate:g}"


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = kept_parser(SEEDS, __doc__)
    parser.add_argument("--tasks", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    return parser.parse_args()


def main() -> None:
    """Measure what is asked for; write the tables once all is there."""
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    out = OUT.with_name(f"{OUT.name}-quick") if arguments.quick else OUT
    conditions = {"settings": SETTINGS, "budgets": BUDGETS, "quick": arguments.quick}
    kept = Kept(out / "found.json", conditions, fresh=arguments.fresh)
    for kind in arguments.tasks:
        for seed in arguments.seeds:
            bench = Bench(kind, seed, arguments, out)
            both = kept.row(f"{kind} {seed}: parents", bench.parents)
            better = max(both, key=both.__getitem__)
            for way in arguments.ways:
                for rate in RATES[:1] if arguments.quick else rates(kept, kind, way, seed):
                    kept.row(
                        name_of(kind, way, rate).format(seed=seed),
                        lambda w=way, r=rate, b=better, m=bench: m.way(w, r, b),
                    )
    if arguments.quick:
        return
    whole = [kind for kind in CASES if complete(kept, kind)]
    text, claims = markdown(kept, whole or list(CASES))
    if not whole:
        print("\n".join(text))
        return
    write("quality", kept.record(SEEDS), "\n".join(text))
    settle(claims)


def complete(kept: Kept, kind: str) -> bool:
    """Return whether all rows of a task are there."""
    return all(best(kept, kind, way, "0")[1].keys() == {*SEEDS} for way in WAYS)


def rates(kept: Kept, kind: str, way: str, seed: int) -> Sequence[float]:
    """Return the rates to try: all with the first seed, and then the one that was best there."""
    first = SEEDS[0]
    grid = CASES[kind].rates
    rows = {rate: kept.rows.get(name_of(kind, way, rate).format(seed=first)) for rate in grid}
    found = {rate: row[str(BUDGETS[-1])] for rate, row in rows.items() if row is not None}
    if seed == first or len(found) < len(grid):
        return grid
    return (max(found, key=found.__getitem__),)


def best(kept: Kept, kind: str, way: str, steps: str) -> tuple[float, dict[int, float]]:
    """Return a way's rate, and its figures by seed."""
    rate = rates(kept, kind, way, SEEDS[-1])[0]
    return rate, kept.over(SEEDS, name_of(kind, way, rate), steps)


def markdown(kept: Kept, kinds: Sequence[str]) -> tuple[list[str], dict[str, bool]]:
    """Return the page of some tasks, and whether a refit is the first at every budget."""
    lines = [
        "# Half the width at equal budgets", "",
        "Test accuracy in %, mean ± half the 95 % interval over seeds (Student's t); behind, the "
        f"lead of `{OURS_ONE}`, paired by seed. Every way is taught by both parents on 8,000 "
        "training samples (hard labels weighted as in the recipe), 64 a step, with the rate of the "
        f"task's grid that is best for it after {BUDGETS[-1]} steps on the first seed's test set, "
        "which is named. 5,000 test samples, 512 calibration samples. "
        "The mean of the parents' weights has their width: no way to a narrower model. The "
        "sparse way keeps the parent's width and has as many non-zero weights as the child's "
        "layers: its file isn't faster. Torch-pruning cuts "
        "the better parent by its own dependency graph, loaded into the stock class; Taylor with "
        "256 labelled samples. The published transport fusion, which needs a trained narrow model "
        "first, stands in `make bench-methods`. Made by `make bench-quality`.", "",
    ]  # fmt: skip
    claims: dict[str, bool] = {}
    for kind, case in ((kind, CASES[kind]) for kind in kinds):
        if not kept.over(SEEDS, f"{kind} {{seed}}: parents", "a"):
            continue
        parents = [spread(kept.over(SEEDS, f"{kind} {{seed}}: parents", p)) for p in "ab"]
        lines += [
            f"## {case.title}", "",
            f"{len(SEEDS)} seeds: {case.seeds}. Rates {', '.join(f'{r:g}' for r in case.rates)}. "
            f"Parents {' and '.join(parents)}.", "",
            "| way | one-shot | " + " | ".join(f"{n} steps" for n in BUDGETS) + " |",
            "| --- | --- |" + " --- |" * len(BUDGETS),
        ]  # fmt: skip
        for way in WAYS:
            cells = [cell(kept, kind, way, str(steps)) for steps in (0, *BUDGETS)]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
        lines += ["", edges(kept, kind), ""]
        for steps in map(str, (0, *BUDGETS)):
            ours = max(average_of(kept, kind, w, steps) for w in (OURS, OURS_ONE))
            others = max(average_of(kept, kind, w, steps) for w in narrow_peers())
            claims[f"{kind}: a refit is first of the narrow models, {steps} steps"] = ours > others
    lines += [f"Machine: {kept.machine()}", ""]
    return lines, claims


def edges(kept: Kept, kind: str) -> str:
    """Say whose best rate is the grid's first or last."""
    grid = CASES[kind].rates
    ends = {grid[0]: "smallest", grid[-1]: "largest"}
    told = [
        f"{way} ({ends[rate]})"
        for way in WAYS
        if (rate := best(kept, kind, way, str(BUDGETS[-1]))[0]) in ends
    ]
    if not told:
        return ""
    return f"At the grid's edge, so that a rate beyond may be better yet: {', '.join(told)}."


def narrow_peers() -> Sequence[str]:
    """Return the ways that aren't ours and end in a model of half the width."""
    return [way for way in WAYS if way not in (OURS, OURS_ONE, SPARSE)]


def average_of(kept: Kept, kind: str, way: str, steps: str) -> float:
    """Return the mean of a way's best rate."""
    found: Mapping[int, float] = best(kept, kind, way, steps)[1]
    return average(found) if found else -math.inf


def cell(kept: Kept, kind: str, way: str, steps: str) -> str:
    """Return a way's figure, its rate, and our lead over it."""
    rate, found = best(kept, kind, way, steps)
    if not found:
        return ""
    _, ours = best(kept, kind, OURS_ONE, steps)
    told = ahead(ours, found) if way != OURS_ONE else ""
    sure = ", not clear" if told and clear(ours, found) == "=" else ""
    named = f" at {rate:g}" if steps != "0" else ""
    return spread(found) + named + (f" ({told}{sure})" if told else "")


if __name__ == "__main__":
    main()
