"""The ways in which a run's parents become the model that finetuning starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimfuse.batch import Batches
from slimfuse.errors import ShapeError
from slimfuse.families import Family
from slimfuse.fuse.baselines import select, subclone
from slimfuse.fuse.gauge import aligned, average
from slimfuse.fuse.gauge_reduce import reduce
from slimfuse.fuse.importance import TOKENS, all_depths_importance
from slimfuse.fuse.intra import IntraSettings, intra_fuse
from slimfuse.fuse.labels import Goals
from slimfuse.fuse.narrowing import count_rows
from slimfuse.fuse.refit import Settings, refit
from slimfuse.fuse.repair import repair
from slimfuse.fuse.transport import TransportSettings, fuse_by_transport
from slimfuse.fuse.union import Parent
from slimfuse.pipeline.fusion_record import (
    averaged,
    part_records,
    refitted,
    stream_tensors,
    transported,
)
from slimfuse.recipe import Fuse, Method, Plans
from slimfuse.saliency.parallel import Processes
from slimfuse.transport import Solver

DEFAULT_REG = 0.05
Record = dict[str, Any]
STREAMS = "streams"
"""In the record of a refit: the maps of its parents' streams, as tensors."""


@dataclass(frozen=True)
class Ingredients:
    """What a method may use.

    parents: the widest first; batches: unlabelled calibration inputs, the same each time; anchor:
    opens the trained narrow model of `fuse.ot.anchor`; goals: returns those of the head, None for
    the mean of the parents' logits; own: the recipe's method; scratch: a folder that is emptied;
    seed: the run's; ranks: the processes that make the start, see `SHARED`.
    """

    parents: list[Parent]
    target: nn.Module
    family: Family
    batches: Batches
    n_batches: int
    fuse: Fuse
    anchor: Callable[[], nn.Module]
    goals: Callable[[], Goals | None]
    own: Method
    scratch: Path
    seed: int
    ranks: Processes

    @property
    def first(self) -> nn.Module:
        """The widest parent: what methods for one parent start from."""
        return self.parents[0].model

    @property
    def same_shape(self) -> bool:
        """Whether the parents and the target have one shape."""
        models = [p.model for p in self.parents]
        shapes = {self.family.shape(m.config) for m in (*models, self.target)}
        return len(shapes) == 1


def solver_of(ot: Plans) -> Solver:
    """Return the solver that a recipe asks for."""
    reg = ot.reg
    if ot.solver in ("sinkhorn", "unbalanced") and reg is None and ot.effective_units is None:
        reg = DEFAULT_REG
    return Solver(ot.solver, reg, ot.effective_units, ot.marginal_reg, ot.mass)


def settings_of(fuse: Fuse, seed: int = 0) -> Settings:
    """Return the settings of a refit that a recipe asks for."""
    return Settings(
        stream=fuse.stream,
        units=fuse.units,
        saliency=fuse.saliency or "energy",
        heads=fuse.heads,
        ridge=None if fuse.ridge == "auto" else fuse.ridge,
        solver=solver_of(fuse.ot),
        layers=fuse.layers,
        seed=seed,
    )


def by_refit(given: Ingredients) -> Record:
    """Fuse by least squares, block by block (fusion.md §3-5)."""
    fusion = refit(
        given.parents, given.target, given.family, given.batches,
        settings_of(given.fuse, given.seed), n_batches=given.n_batches, goals=given.goals(),
        scratch=given.scratch, ranks=given.ranks,
    )  # fmt: skip
    names = [p.name for p in given.parents]
    maps = stream_tensors(fusion.mixes, fusion.segments, names)
    return refitted(fusion, names) | {STREAMS: maps}


def by_gauge(given: Ingredients) -> Record:
    """Average in common coordinates, refit the average, narrow it (fusion.md §8)."""
    fuse, parents, whole = given.fuse, given.parents, _whole(given)
    importance = _importance(given)
    found = average(
        parents, whole, given.family, given.batches, alignment=fuse.alignment,
        solver=None if fuse.ot.solver == "emd" else solver_of(fuse.ot), importance=importance,
    )  # fmt: skip
    record = averaged(found, [p.name for p in parents])
    if fuse.refit:
        record |= _repaired(given, whole, importance)
    return _narrowed(given, whole, importance) | record


def _whole(given: Ingredients) -> nn.Module:
    """Return the target, or a random model of the parents' shape that is narrowed to it."""
    return given.target if given.same_shape else given.family.build(given.first.config)


def _importance(given: Ingredients) -> Tensor:
    models = [p.model for p in given.parents]
    layouts = [given.family.layout(m.config) for m in models]
    rows = count_rows(models[0], layouts[0], given.batches())
    return all_depths_importance(models, layouts, given.batches, TOKENS / rows)


def _repaired(given: Ingredients, whole: nn.Module, importance: Tensor) -> Record:
    references = aligned(given.parents, given.family, given.batches, importance)
    parts = repair(
        references, whole, given.family, given.batches, ridge=settings_of(given.fuse).ridge,
        goals=given.goals(), scratch=given.scratch,
    )  # fmt: skip
    return {"repaired": part_records(parts)}


def _narrowed(given: Ingredients, whole: nn.Module, importance: Tensor) -> Record:
    if whole is given.target:
        return {}
    if not given.fuse.refit:
        reduce(whole, given.target, given.family, given.batches, importance=importance)
        return {}
    fusion = refit(
        [Parent("average", whole)], given.target, given.family, given.batches,
        settings_of(given.fuse, given.seed), n_batches=given.n_batches, scratch=given.scratch,
    )  # fmt: skip
    return refitted(fusion, ["average"])


def by_transport(given: Ingredients) -> Record:
    """Move the parents to a trained narrow model's units and average (fusion.md §7)."""
    ot, anchor = given.fuse.ot, given.anchor()
    target: Any = given.target.config
    for model in (anchor, *(p.model for p in given.parents)):
        config: Any = model.config
        config.id2label = target.id2label  # the same classes, maybe without their names
    settings = TransportSettings(
        solver=solver_of(ot), cost=ot.cost, masses=ot.masses, residual=ot.residual, qk=ot.qk,
        heads=ot.heads, tokens=ot.tokens, window=ot.window, anchor_weight=ot.anchor_weight,
        saliency=given.fuse.saliency or "energy", parent_weights=given.fuse.parent_weights,
        seed=given.seed,
    )  # fmt: skip
    fusion = fuse_by_transport(
        given.parents, anchor, given.target, given.family, given.batches, settings,
        n_batches=given.n_batches, scratch=given.scratch,
    )  # fmt: skip
    return transported(fusion, [p.name for p in given.parents])


def by_plain_average(given: Ingredients) -> Record:
    """Average parameters of equal shape as they stand."""
    if not given.same_shape:
        shapes = [str(given.family.shape(m.config))
                  for m in (*(p.model for p in given.parents), given.target)]  # fmt: skip
        raise ShapeError(
            "a plain average needs parents and a target of one shape",
            where="fuse.method",
            got="; ".join(dict.fromkeys(shapes)),
            hint="use method: refit",
        )
    average(given.parents, given.target, given.family, given.batches, alignment="none")
    return {}


def by_merging(given: Ingredients) -> Record:
    """Merge the first parent's units onto its most salient ones (Intra-Fusion)."""
    fuse, name = given.fuse, given.parents[0].name
    default = IntraSettings()
    settings = IntraSettings(
        saliency=fuse.saliency or default.saliency, cost=fuse.ot.cost, solver=solver_of(fuse.ot),
        seed=given.seed,
    )  # fmt: skip
    found = intra_fuse(given.first, given.target, given.family, given.batches, settings, name=name)
    return transported(found, [name])


def by_pruning(given: Ingredients) -> Record:
    """Keep the most active units of the first parent, as they are."""
    select(given.first, given.target, given.family, given.batches)
    return {}


def by_copying(given: Ingredients) -> Record:
    """Copy the first parent's largest units, scaled for the width."""
    subclone(given.first, given.target, given.family)
    return {}


def by_keeping(given: Ingredients) -> Record:
    """Take the first parent as it is; `checks.check_methods` saw that it fits."""
    given.target.load_state_dict(given.first.state_dict())
    return {}


def at_random(_given: Ingredients) -> Record:
    """Leave the target as it was initialised."""
    return {}


def by_random_features(given: Ingredients) -> Record:
    """Give a random model the same refit as the recipe's method: what that alone is good for.

    Beside `gauge` the whole model is refitted like its average; else the writers and the head.
    """
    if given.own == "gauge":
        importance, whole = _importance(given), _whole(given)
        record = _repaired(given, whole, importance)
        return _narrowed(given, whole, importance) | record
    fusion = refit(
        given.parents, given.target, given.family, given.batches, settings_of(given.fuse),
        n_batches=given.n_batches, goals=given.goals(), scratch=given.scratch, random_features=True,
        ranks=given.ranks,
    )  # fmt: skip
    return refitted(fusion, [p.name for p in given.parents])


SHARED = frozenset({("refit", "refit"), ("random-refit", "refit")})
"""Methods, beside the recipe's, whose batches several processes share; one alone does the rest."""
METHODS: dict[str, Callable[[Ingredients], Record]] = {
    "refit": by_refit,
    "gauge": by_gauge,
    "ot": by_transport,
    "intra": by_merging,
    "vanilla": by_plain_average,
    "select": by_pruning,
    "subclone": by_copying,
    "keep": by_keeping,
    "random": at_random,
    "random-refit": by_random_features,
}
