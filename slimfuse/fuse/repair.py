"""Refit of a model that stands already: every layer against what its references compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches
from slimfuse.families import Family
from slimfuse.fuse.builder import Builder, Held, Part
from slimfuse.fuse.cache import StreamCache
from slimfuse.fuse.choice import Choice, Maps, Scores
from slimfuse.fuse.fits import Draw, Ridge
from slimfuse.fuse.importance import TOKENS, gradients, token_weights
from slimfuse.fuse.labels import Goals, MeanLogits
from slimfuse.fuse.memory import hold_steady
from slimfuse.fuse.narrowing import count_rows
from slimfuse.fuse.refit import Settings, build_blocks
from slimfuse.fuse.union import Member, Parent, Union
from slimfuse.spaces import LinearMap


def repair(
    references: Sequence[Parent],
    model: nn.Module,
    family: Family,
    batches: Batches,
    *,
    ridge: Ridge = None,
    goals: Goals | None = None,
    scratch: Path | None = None,
) -> tuple[Part, ...]:
    """Refit every Linear of `model` in place and return what was done.

    Each layer is fitted, in order, from what the model itself feeds it to what the first reference
    computes there (writers to what is missing of its stream), about its own present weights; the
    head to `goals`, by default the mean logits of all references. With ridge None a layer that
    leaving out finds best as it is stays untouched. Embeddings, norms and readers without a bias
    stay. references: models
    of the shape of `model` in one gauge (see `gauge`). Hidden layers that followed the mean of two
    trained models would follow none: 84 against 88 % (docs/decisions/0009).
    Source: fusion.md §8; with one reference RegMean's least squares (arXiv 2212.09849, eq. 3).
    """
    shape = family.shape(model.config)
    assert all(family.shape(r.model.config) == shape for r in references), "shapes differ"
    total = sum(r.weight for r in references)
    shares = [r.weight / total for r in references]
    layouts = [family.layout(r.model.config) for r in references]
    depth = len(layouts[0].blocks)
    if goals is None and layouts[0].head:
        head = model.get_parameter(f"{layouts[0].head}.weight")
        goals = MeanLogits(shares, len(head))
    hold_steady()
    with torch.no_grad(), StreamCache(folder=scratch) as cache:
        segments = tuple(range(i, i + 1) for i in range(depth))
        union = Union(references, family, [segments] * len(references))
        rows = count_rows(references[0].model, layouts[0], batches())
        found = [
            gradients(r.model, layouts[i], batches(), union.checkpoints(i), TOKENS / rows)
            for i, r in enumerate(references)
        ]
        eye = torch.eye(shape.hidden_size, dtype=torch.float64)
        builder = _Repair(
            union, model, family, cache, Settings(ridge=ridge),
            Draw(token_weights(found, shares), rows),
            mixes=[eye, *(0 * eye for _ in shares[1:])], readbacks=[eye] * len(shares),
        )  # fmt: skip
        builder.run.start(batches())
        build_blocks(builder, depth)
        builder.head(goals)
    return tuple(builder.parts)


class _Repair(Builder):
    """A builder whose units are the references' own and whose priors are the model's."""

    norms_stay = True

    def _fit_reader(self, index: int, part: str, *given: Any) -> None:
        """Fit a reader that has a bias; one without leans on a norm that stays."""
        module = self.target.get_submodule(getattr(self.layout.blocks[index], part))
        if module.bias is not None:
            super()._fit_reader(index, part, *given)

    def _choose_heads(self, members: Sequence[Member], cov: Tensor, scores: Scores) -> Choice:
        block = self.union.block(members[0])
        return self._mean(members, block.head_space, self.shape.num_attention_heads, len(cov))

    def _choose_units(self, members: Sequence[Member], cov: Tensor) -> Choice:
        block = self.union.block(members[0])
        return self._mean(members, block.mlp_space, self.shape.intermediate_size, len(cov))

    def _mean(self, members: Sequence[Member], space: str, count: int, units: int) -> Choice:
        weights = [self.mixes[m.parent][0, 0] for m in members]
        eye = torch.eye(count, dtype=torch.float64)
        maps: list[Maps] = [{space: LinearMap(w * eye, w * eye)} for w in weights]
        each = torch.eye(units // len(members), dtype=torch.float64)
        return Choice(maps, torch.cat([w * each for w in weights]), ())

    def _choose_pooled(self, cov: Tensor, out: Tensor, count: int) -> Tensor:
        each = torch.eye(len(cov) // len(self.mixes), dtype=torch.float64)
        return torch.cat([mix[0, 0] * each for mix in self.mixes])

    def _held(self, name: str, _transported: Callable[[], Tensor]) -> Held:
        module = self.target.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        bias = module.bias.double() if isinstance(module.bias, Tensor) else None
        return module.weight.double(), bias
