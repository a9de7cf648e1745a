"""The ways in which a run's parents become the model that finetuning starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimfuse.errors import ShapeError
from slimfuse.families import Family
from slimfuse.fuse.baselines import select, subclone
from slimfuse.fuse.gauge import aligned, average
from slimfuse.fuse.gauge_reduce import reduce
from slimfuse.fuse.importance import TOKENS, all_depths_importance
from slimfuse.fuse.labels import Goals
from slimfuse.fuse.refit import Settings, count_rows, refit
from slimfuse.fuse.repair import repair
from slimfuse.fuse.transport import TransportSettings, fuse_by_transport
from slimfuse.fuse.union import Parent
from slimfuse.pipeline.fusion_record import averaged, refitted, transported
from slimfuse.recipe import Fuse, Plans
from slimfuse.transport import Solver

DEFAULT_REG = 0.05
SOFT_UNITS = 8.0  # entropic plans of fewer units converge slowly
Record = dict[str, Any]


@dataclass(frozen=True)
class Ingredients:
    """What a method may use.

    parents: the widest first; batches: unlabelled calibration inputs, the same each time; anchor:
    opens the trained narrow model of `fuse.ot.anchor`; goals: of the head, None for the mean of
    the parents' logits.
    """

    parents: list[Parent]
    target: nn.Module
    family: Family
    batches: Callable[[], Iterable[Tensor]]
    n_batches: int
    fuse: Fuse
    anchor: Callable[[], nn.Module]
    goals: Goals | None

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


def settings_of(fuse: Fuse) -> Settings:
    """Return the settings of a refit that a recipe asks for."""
    return Settings(
        stream=fuse.stream,
        units=fuse.units,
        heads=fuse.heads,
        ridge=None if fuse.ridge == "auto" else fuse.ridge,
        solver=solver_of(fuse.ot),
        layers=fuse.layers,
    )


def by_refit(given: Ingredients) -> Record:
    """Fuse by least squares, block by block (fusion.md §3-5)."""
    fusion = refit(
        given.parents, given.target, given.family, given.batches, settings_of(given.fuse),
        n_batches=given.n_batches, goals=given.goals,
    )  # fmt: skip
    return refitted(fusion, [p.name for p in given.parents])


def by_gauge(given: Ingredients) -> Record:
    """Average in common coordinates, refit the average, narrow it (fusion.md §8)."""
    fuse, family, parents = given.fuse, given.family, given.parents
    whole = given.target if given.same_shape else family.build(given.first.config)
    settings = settings_of(fuse)
    models = [p.model for p in parents]
    layouts = [family.layout(m.config) for m in models]
    rows = count_rows(models[0], layouts[0], given.batches())
    importance = all_depths_importance(models, layouts, given.batches, TOKENS / rows)
    found = average(
        parents, whole, family, given.batches, alignment=fuse.alignment,
        effective_units=fuse.ot.effective_units or SOFT_UNITS, importance=importance,
    )  # fmt: skip
    record = averaged(found, [p.name for p in parents])
    if fuse.refit:
        references = aligned(parents, family, given.batches, importance)
        repair(references, whole, family, given.batches, ridge=settings.ridge, goals=given.goals)
    if whole is given.target:
        return record
    if not fuse.refit:
        reduce(whole, given.target, family, given.batches, importance=importance)
        return record
    alone = [Parent("average", whole)]
    fusion = refit(alone, given.target, family, given.batches, settings, n_batches=given.n_batches)
    return refitted(fusion, ["average"]) | record


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
    )  # fmt: skip
    fusion = fuse_by_transport(
        given.parents, anchor, given.target, given.family, given.batches, settings,
        n_batches=given.n_batches,
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


def by_pruning(given: Ingredients) -> Record:
    """Keep the most active units of the first parent, as they are."""
    select(given.first, given.target, given.family, given.batches)
    return {}


def by_copying(given: Ingredients) -> Record:
    """Copy the first parent's largest units, scaled for the width."""
    subclone(given.first, given.target, given.family)
    return {}


def at_random(_given: Ingredients) -> Record:
    """Leave the target as it was initialised."""
    return {}


def by_random_features(given: Ingredients) -> Record:
    """Refit the writers and the head of a random model: what the refit alone is good for."""
    fusion = refit(
        given.parents, given.target, given.family, given.batches, settings_of(given.fuse),
        n_batches=given.n_batches, goals=given.goals, random_features=True,
    )  # fmt: skip
    return refitted(fusion, [p.name for p in given.parents])


METHODS: dict[str, Callable[[Ingredients], Record]] = {
    "refit": by_refit,
    "gauge": by_gauge,
    "ot": by_transport,
    "vanilla": by_plain_average,
    "select": by_pruning,
    "subclone": by_copying,
    "random": at_random,
    "random-refit": by_random_features,
}
