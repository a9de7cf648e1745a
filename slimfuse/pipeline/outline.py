"""A plan without weights: of the parents' config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from slimfuse.data.gguf import SUFFIX
from slimfuse.errors import ParentError, ShapeError, UserError
from slimfuse.families import Family, ImageFamily, family_of
from slimfuse.pipeline.checks import check_methods, measured_by
from slimfuse.pipeline.common import ParentJob
from slimfuse.pipeline.images import DEFAULT_IMAGE_SIZE, image_size
from slimfuse.pipeline.job import task_of
from slimfuse.pipeline.labelling import labelled
from slimfuse.pipeline.lookup import CONFIG, find_folder
from slimfuse.pipeline.planning import Outset, Plan, plan_of
from slimfuse.pipeline.shaping import largest_config, shape_of, wish_of
from slimfuse.pipeline.sparse import check_zeros
from slimfuse.pipeline.texts import longest, new_text_config
from slimfuse.pipeline.vocabularies import first_position
from slimfuse.recipe import AnyRecipe, Recipe, Train
from slimfuse.recipe.matching import IMAGE_FAMILIES
from slimfuse.shapes import resolve
from slimfuse.tasks import LanguageTask, TextTask

ANCHOR = "anchor"
WHOLE = "run slimfuse plan without --outline"
NOTE = (
    "Only config.json was read: training steps depend on the data, heads have the classes that the "
    "configs name, and memory is without the prepared samples."
)


def make_outline(recipe: AnyRecipe, path: Path) -> Plan:
    """Return the plan of a recipe whose weights, data and tokenizers need not be here.

    path: the recipe's file. Of a hub id only config.json is fetched. Texts are taken to be as long
    as they may be. Raises ParentError, ShapeError, or UserError for plain nets.
    """
    if not isinstance(recipe, Recipe):
        what = "plain nets have no config.json to be outlined from"
        raise UserError(what, where="family", got=recipe.family, hint=WHOLE)
    budget = recipe.target.budget
    if budget is not None and budget.latency_ratio is not None:
        raise ShapeError(
            "a latency budget is measured, which an outline doesn't do",
            where="target.budget.latency_ratio",
            hint=f"budget params or flops, or {WHOLE}",
        )
    family = family_of(recipe.family, recipe.task)
    if budget is not None and budget.allocation == "saliency":
        raise ShapeError(
            "saliency is of a parent's weights, which an outline doesn't read",
            where="target.budget.allocation",
            got=budget.allocation,
            allowed="proportional",
            hint=f"set it to proportional, or {WHOLE}",
        )
    saved = _saved(recipe, family, path.parent)
    opened = _Pictures if recipe.family in IMAGE_FAMILIES else _Texts
    samples = opened(recipe, family, saved)
    configs = {}
    for p in recipe.parents:
        configs[p.name] = saved.get(p.name) or samples.fresh(p.train, f"parents.{p.name}.train")
    mismatched = family.mismatches(configs)
    if mismatched:
        raise ParentError(
            "the parents don't fit each other", where="parents", got="; ".join(mismatched)
        )
    largest = largest_config(measured_by(recipe, configs), family)
    proposal = resolve(wish_of(recipe.target), largest, family)
    jobs = {
        p.name: ParentJob(p.name, p.weight, configs[p.name], None, None, p.train, ())
        for p in recipe.parents
    }
    spec, anchor = recipe.fuse.ot.anchor, None
    if spec is not None and "ot" in (recipe.fuse.method, *recipe.baselines):
        found = saved.get(ANCHOR) or samples.fresh(spec.train, "fuse.ot.anchor.train")
        anchor = ParentJob(ANCHOR, 1.0, found, None, None, spec.train, ())
    chosen = [jobs[name] for name in recipe.fuse.parents or jobs]
    chosen.sort(key=lambda p: -family.shape(p.config).hidden_size)
    check_methods(recipe, chosen, proposal.config, family, anchor)
    check_zeros(recipe.sparsify, family, proposal.config)
    plan = plan_of(
        Outset(
            recipe, family, samples.task, configs | ({ANCHOR: anchor.config} if anchor else {}),
            tuple(jobs), proposal, proposal.config, {}, recipe.data.calibration.samples,
            samples.tokens(proposal.config), samples.flops, 0,
        )
    )  # fmt: skip
    said = f"FLOPs and memory are of {samples.tokens(proposal.config)} tokens a sample. {NOTE}"
    return replace(plan, notes=(*plan.notes, said))


def _saved(recipe: Recipe, family: Family, beside: Path) -> dict[str, Any]:
    """Return the configs of all models that are saved, or that training starts from, by name."""
    models = [(p.name, p.from_, p.revision, p.train, f"parents.{p.name}") for p in recipe.parents]
    spec = recipe.fuse.ot.anchor
    if spec is not None:
        models.append((ANCHOR, spec.from_, None, spec.train, "fuse.ot.anchor"))
    found = {}
    for name, origin, revision, train, place in models:
        where = f"{place}.from" if origin is not None else f"{place}.train.start"
        origin = origin or (train.start if train is not None else None)
        if origin is None:
            continue
        if Path(origin).suffix == SUFFIX:
            what = "a GGUF file has no config.json"
            raise ParentError(what, where=where, got=origin, hint=WHOLE)
        folder = find_folder(origin, beside, CONFIG, where=where, revision=revision)
        config = family.load_config(str(folder))
        found[name] = labelled(config, (train.classes if train is not None else None) or ())
    return found


class _Pictures:
    """What is known of a recipe's images without opening any."""

    def __init__(self, recipe: Recipe, family: Family, saved: Mapping[str, Any]) -> None:
        self.task, self.family = task_of(recipe), cast(ImageFamily, family)
        size = image_size(recipe.data, {name: c.image_size for name, c in saved.items()})
        if size is None and recipe.data.source in ("imagefolder", "datasets"):
            size = DEFAULT_IMAGE_SIZE
        self.size = size

    def fresh(self, train: Train | None, where: str) -> Any:
        """Return the config of a new model."""
        assert train is not None and train.config is not None, "the recipe was checked"
        if self.size is None:
            raise ShapeError(
                "the images' size isn't known without them",
                where="data.image_size",
                hint=f"give it, or {WHOLE}",
            )
        return self.family.new_config(
            shape_of(train.config),
            patch_size=train.config.patch_size,
            image_size=self.size,
            labels=train.classes or (),
        )

    def tokens(self, config: Any) -> int:
        """Return how many tokens an image becomes."""
        return self.family.tokens(config)

    def flops(self, config: Any) -> int:
        """Return the floating-point operations of one image."""
        return self.family.flops(config)


class _Texts:
    """What is known of a recipe's texts without opening any."""

    def __init__(self, recipe: Recipe, family: Family, saved: Mapping[str, Any]) -> None:
        task = task_of(recipe)
        if isinstance(task, LanguageTask):
            task = task.packing(recipe.data.packing)
        assert isinstance(task, TextTask)
        self.task, self.family = task, family
        most = [c.max_position_embeddings - first_position(family, c) for c in saved.values()]
        self.length = longest(recipe.data, task, most)
        self.positions = min(most, default=self.length)
        rows = [int(c.vocab_size) for c in saved.values()]
        self.rows = max(rows, default=recipe.data.vocabulary)

    def fresh(self, train: Train | None, where: str) -> Any:
        """Return the config of a new model, whose vocabulary is as large as it may be."""
        assert train is not None and train.config is not None, "the recipe was checked"
        if self.rows is None:
            raise ParentError(
                "how many tokens there are isn't known without the tokenizer",
                where="data.tokenizer",
                hint=WHOLE,
            )
        labels = train.classes or ()
        return new_text_config(
            self.family, train.config, labels, vocab_size=self.rows, positions=self.positions
        )

    def tokens(self, config: Any) -> int:
        """Return the most tokens of a text."""
        return self.length

    def flops(self, config: Any) -> int:
        """Return the floating-point operations of the longest text."""
        return self.family.flops(config, self.length)
