"""`compare`: every method and control of a recipe at equal budgets, over several seeds.

Or its ablations: the recipe with one key changed at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from slimfuse.errors import RecipeError, SlimfuseError, UserError
from slimfuse.families import Shape
from slimfuse.pipeline.candidates import same_test
from slimfuse.pipeline.common import ParentJob, Part
from slimfuse.pipeline.contenders import ablation, ladder, variations
from slimfuse.pipeline.held_out import learnt
from slimfuse.pipeline.job import Job, prepare
from slimfuse.pipeline.lock import lock_text
from slimfuse.pipeline.run import prepare_again, quiet, write_lock
from slimfuse.pipeline.shaping import pinned
from slimfuse.pipeline.stages import Stages
from slimfuse.pipeline.tuning import finetune_steps
from slimfuse.processes import alone
from slimfuse.progress import console
from slimfuse.recipe import Anchor, Located, Recipe, Train, load_located
from slimfuse.report import Cells, tables_fragment
from slimfuse.store import Store, write_text
from slimfuse.tasks import Evidence, Metric, Samples

LEVEL = 0.95
ACCURACY = Metric("accuracy")
WILSON = "; Wilson's over the samples for one seed or a model that is the same with all"


@dataclass
class Entry:
    """One line of the comparison: figures of one metric by budget in steps and by seed."""

    name: str
    kind: str
    figures: dict[int, dict[int, float]] = field(default_factory=dict)

    def add(self, steps: int, seed: int, value: float) -> None:
        """Add one seed's figure."""
        self.figures.setdefault(steps, {})[seed] = value


@dataclass(frozen=True)
class Comparison:
    """Every contender's figures of the task's metric; own: the recipe's method among them.

    refused: contenders that can't be made, and why; vary: the overrides of an ablation's rows.
    """

    name: str
    own: str
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    samples: int
    entries: tuple[Entry, ...]
    refused: dict[str, str]
    metric: Metric = ACCURACY
    vary: tuple[str, ...] = ()

    def entry(self, name: str) -> Entry:
        """Return the line of this name, an empty one where it was refused."""
        found = next((e for e in self.entries if e.name == name), None)
        return found or Entry(name, "method")

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the table, and what was left out."""
        refused = [f"left out: {name}: {why}" for name, why in self.refused.items()]
        cells = Cells(["model", *_heads(self)], _table(self), _conditions(self))
        return tables_fragment(f"{self.name}: {_kind(self)}", (), [cells], warnings=refused)


def compare(
    recipe: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] | None = None,
    overrides: tuple[str, ...] = (),
    vary: Sequence[str] = (),
    out: str | Path | None = None,
) -> Comparison:
    """Run a recipe's method beside all others and the controls, and write one table.

    Every seed s trains the recipe's own parents anew (their seeds + 100·s), draws its own
    calibration samples and order of finetuning; `{seed}` in an override becomes the seed.
    steps: budgets of finetuning, the same teachers, data and rates for all (default: the
    recipe's); the one-shot figures always stand beside them.
    vary: `KEY=V1,V2,…`: an ablation instead, with a row for the recipe as it is and one for each
    value, of several options one key at a time. A row is the recipe with `--set KEY=VALUE` on the
    same parents, seeds, test set and budgets; the target's shape is the recipe's, too, unless the
    key is one of the target's.
    Finished parts are kept in out (default runs/NAME-compare), so that a killed run goes on where
    it stood. Raises UserError for bad input.
    """
    alone("compare")
    quiet()
    names = variations(vary)
    path = Path(recipe)
    base = _comparable(load_located(path, _for_seed(overrides, seeds[0])))
    root = Path(out) if out is not None else Path("runs") / f"{base.name}-compare"
    entries: dict[str, Entry] = {}
    refused: dict[str, str] = {}
    budgets: tuple[int, ...] = ()
    samples = 0
    metric = ACCURACY
    shape: Shape | None = None
    shapes: dict[str, Shape] = {}
    for seed in seeds:
        loaded = load_located(path, _for_seed(overrides, seed))
        seeded = _seeded(_comparable(loaded), seed)
        varied = {n: load_located(path, _for_seed((*overrides, n), seed)) for n in names}
        store = Store(root / f"seed-{seed}")
        store.check_ours()
        try:
            # every seed gets the first one's shape: a measured latency is never the same twice
            job = prepare_again(seeded if shape is None else pinned(seeded, shape), path, store)
        except UserError as error:
            error.where = loaded.locate(error.where)
            raise
        shape = job.proposal.shape
        budgets = tuple(sorted({0, *(steps if steps is not None else (finetune_steps(job),))}))
        samples, metric = job.count("test"), job.task.metric
        variants = {n: _variant(one, n, seed, job, shapes) for n, one in varied.items()}
        torch.set_num_threads(job.threads)
        with store.lock():
            write_lock(lock_text(job), store)
            own = _one_seed(job, seed, store, budgets, variants, entries, refused)
        done = tuple(seeds)[: seeds.index(seed) + 1]
        listed = tuple(entries.values())
        result = Comparison(base.name, own, done, budgets, samples, listed, refused, metric, names)
        file = "ablation" if names else "compare"
        write_text(root / f"{file}.json", json.dumps(asdict(result), indent=1) + "\n")
        write_text(root / f"{file}.md", markdown(result))
    return result


def _variant(one: Located, name: str, seed: int, job: Job, shapes: dict[str, Shape]) -> Recipe:
    """Return a seed's recipe of one row, with the shape that the first seed gave it (`shapes`).

    What can be known to fail fails with the first seed, before any work.
    """
    recipe = _seeded(_comparable(one), seed)
    if name not in shapes:
        if recipe.target == job.recipe.target:
            recipe = pinned(recipe, job.proposal.shape)
        try:
            made = prepare(recipe, job.path)
        except UserError as error:
            error.where = one.locate(error.where)
            raise
        if not same_test(made, job):
            what = "this row would be measured on other samples than the recipe"
            raise UserError(what, where="--vary", got=name, allowed="one test set for all rows")
        shapes[name] = made.proposal.shape
    return pinned(recipe, shapes[name])


def _comparable(loaded: Located) -> Recipe:
    """Return the recipe; raises RecipeError for plain nets, whose methods are other ones."""
    if isinstance(loaded.recipe, Recipe):
        return loaded.recipe
    raise RecipeError(
        "compare takes recipes of declared families only",
        where=loaded.locate("family"),
        got=loaded.recipe.family,
        hint="compress with baselines: [ot, vanilla, unfused, random] finetunes them all alike",
    )


def _one_seed(
    job: Job,
    seed: int,
    store: Store,
    budgets: Sequence[int],
    variants: Mapping[str, Recipe],
    entries: dict[str, Entry],
    refused: dict[str, str],
) -> str:
    """Measure all contenders of one seed; return the name of the recipe's own method."""
    metric = job.task.metric

    def note(name: str, kind: str, steps: int, value: float) -> None:
        entries.setdefault(name, Entry(name, kind)).add(steps, seed, value)
        told = f"{100 * value:.2f}%" if metric.share else f"{value:.4g}"
        console.print(f"  {name}, {steps} steps: {told}" if steps else f"  {name}: {told}")

    stages = Stages(job, store)
    shared: dict[Part, Samples] = stages.shared

    def headline(made: Stages, evidence: Evidence) -> float:
        return made.figure(evidence).value

    scores = {p.name: headline(stages, stages.outputs(p).test) for p in job.parents}
    for name, value in scores.items():
        note(f"parent {name}", "parent", 0, value)
    if job.anchor is not None:
        note("anchor", "parent", 0, headline(stages, stages.outputs(job.anchor).test))
    recipe = pinned(job.recipe, job.proposal.shape)
    if variants:
        contenders = ablation(recipe, variants)
    else:
        fused = {p.name: scores[p.name] for p in job.by_width}
        best = next(p for p in job.by_width if p.name == metric.best(fused))
        copy, untrained = stages.parent(best)[0].resolve(), _untrained(stages, best)
        contenders = ladder(recipe, best.name, str(copy), str(untrained))
    for contender in contenders:
        name = contender.name
        try:
            prepared = prepare(contender.recipe, job.path)
            for steps in budgets if contender.trains else (0,):
                own = Stages(_trained_for(prepared, steps), store, shared)
                if own.base != stages.base:  # a variant may see other training samples
                    own.shared = {}
                stage = own.finetune("fused") if steps else own.start(contender.start)
                value = headline(own, own.evidence(stage))
                note(name, contender.kind, steps, value)
        except UserError as error:
            refused[name] = error.what if error.got is None else f"{error.what} ({error.got})"
        except (SlimfuseError, RuntimeError) as error:  # a failure is a figure, not the end
            refused[name] = f"failed with seed {seed}: {getattr(error, 'what', error)}"
    return contenders[0].name


def _trained_for(job: Job, steps: int) -> Job:
    spec = job.recipe.finetune
    epochs = steps / math.ceil(learnt(job.count("train"), spec.validation) / spec.batch_size)
    finetune = spec.model_copy(update={"epochs": epochs})
    return replace(job, recipe=job.recipe.model_copy(update={"finetune": finetune}))


def _untrained(stages: Stages, parent: ParentJob) -> Path:
    """Return the folder of a model of a parent's shape with random weights."""
    job = stages.job
    seed = job.recipe.runtime.seed + 1000

    def build(folder: Path) -> None:
        torch.manual_seed(seed)
        stages.save(job.family.build(parent.config), folder)

    inputs = stages.base | {"untrained": stages.parent(parent)[1], "seed": seed}
    return stages.store.stage("untrained", inputs, build).path.resolve()


def _for_seed(overrides: Sequence[str], seed: int) -> tuple[str, ...]:
    return tuple(o.replace("{seed}", str(seed)) for o in overrides)


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe with every random choice of its own."""

    def shifted(train: Train | None) -> Train | None:
        return train and train.model_copy(update={"seed": train.seed + 100 * seed})

    parents = tuple(p.model_copy(update={"train": shifted(p.train)}) for p in recipe.parents)
    anchor: Anchor | None = recipe.fuse.ot.anchor
    if anchor is not None:
        anchor = anchor.model_copy(update={"train": shifted(anchor.train)})
    ot = recipe.fuse.ot.model_copy(update={"anchor": anchor})
    calibration = recipe.data.calibration.model_copy(
        update={"seed": recipe.data.calibration.seed + seed}
    )
    return recipe.model_copy(
        update={
            "parents": parents,
            "fuse": recipe.fuse.model_copy(update={"ot": ot}),
            "data": recipe.data.model_copy(update={"calibration": calibration}),
            "finetune": recipe.finetune.model_copy(update={"seed": recipe.finetune.seed + seed}),
            "runtime": recipe.runtime.model_copy(update={"seed": recipe.runtime.seed + seed}),
        }
    )


def interval(values: Sequence[float], samples: int) -> tuple[float, float, float]:
    """Return mean, low and high (95 %): Student's t over seeds, Wilson's of a single seed.

    samples: of a share of right answers; 0 of another figure, of which one seed has no interval.
    """
    from scipy.stats import binomtest, t

    mean = sum(values) / len(values)
    if not samples and len(values) == 1:
        return mean, mean, mean
    if samples and len(set(values)) == 1:  # one seed, or a model that no seed changes
        found = binomtest(round(mean * samples), samples).proportion_ci(method="wilson")
        return mean, float(found.low), float(found.high)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean, mean - half, mean + half


def lead(
    first: Mapping[int, float], other: Mapping[int, float]
) -> tuple[float, float, float] | None:
    """Return the mean of first - other over common seeds and its 95 % interval; None for one."""
    common = sorted(first.keys() & other.keys())
    return None if len(common) < 2 else interval([first[s] - other[s] for s in common], 0)


def markdown(result: Comparison) -> str:
    """Return the table: means over seeds ± half the 95 % interval, and each seed's figures."""
    heads = _heads(result)
    lines = [
        f"# {result.name}: {_kind(result)}",
        "",
        _conditions(result, code="`"),
        "",
        f"| model | {' | '.join(heads)} |",
        f"| --- |{' --- |' * len(heads)}",
    ]
    lines += [f"| {' | '.join(row)} |" for row in _table(result)]
    lines += ["", "Per seed:", ""]
    for entry in result.entries:
        each = "; ".join(
            f"{b} steps: " + ", ".join(_number(v, result.metric) for v in values.values())
            for b, values in entry.figures.items()
        )
        lines.append(f"- {entry.name}: {each}")
    if result.refused:
        lines += ["", "Left out:", ""]
        lines += [f"- {name}: {why}" for name, why in result.refused.items()]
    return "\n".join(lines) + "\n"


def _kind(result: Comparison) -> str:
    return f"{'ablations' if result.vary else 'methods and controls'} at equal budgets"


def _heads(result: Comparison) -> list[str]:
    return [f"{b} steps" if b else "one-shot" for b in result.budgets]


def _table(result: Comparison) -> list[list[str]]:
    first = result.entry(result.own)
    return [
        [entry.name, *(_cell(entry, first, b, result) for b in result.budgets)]
        for entry in result.entries
    ]


def _conditions(result: Comparison, code: str = "") -> str:
    if result.vary:
        last = "A row KEY=VALUE is the recipe with that key alone changed."
    else:
        last = (
            "The best parent is the best on the test set, which favours the methods that start "
            "from it alone."
        )
    return (
        f"{_title(result.metric)}, {result.samples:,} test samples, seeds "
        f"{', '.join(map(str, result.seeds))}; ± is half the 95 % interval over seeds (Student's "
        f"t, wide for few seeds{WILSON if result.metric.key == 'accuracy' else ''}). Behind, "
        f"the lead of {code}{result.entry(result.own).name}{code}, paired by seed. {last}"
    )


def _title(metric: Metric) -> str:
    name = metric.key.replace("_", " ").capitalize()
    return f"{name} in %" if metric.share else name


def _number(value: float, metric: Metric) -> str:
    return f"{100 * value:.2f}" if metric.share else f"{value:.4g}"


def _cell(entry: Entry, first: Entry, budget: int, result: Comparison) -> str:
    values, metric = entry.figures.get(budget), result.metric
    if not values:
        return ""
    samples = result.samples if metric.key == "accuracy" else 0
    mean, low, high = interval(list(values.values()), samples)
    text = f"{_number(mean, metric)} ± {_number((high - low) / 2, metric)}"
    ahead = None if entry is first else lead(first.figures.get(budget, {}), values)
    if ahead is not None:
        own, least, most = (("+" if v >= 0 else "") + _number(v, metric) for v in ahead)
        text += f" ({own}, {least} … {most})"
    return text
