"""The control that stands beside every refit: a random model whose writers alone are fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from slimfuse.batch import Inputs
from slimfuse.fuse.builder import Builder, Held
from slimfuse.fuse.choice import Choice


class RandomFeatures(Builder):
    """The control: what reads the stream stays as it was initialised, only writers are fitted."""

    turns = False

    def embed(self, batches: Iterable[Inputs]) -> None:
        """Start the streams; the embeddings stay."""
        self.run.start(batches)

    def _fit_reader(self, *_: object) -> None:
        """Leave the layer as it is."""

    def _choose_heads(self, *_: object) -> Choice:
        return Choice([], torch.zeros(0, self.shape.num_attention_heads * self.head_dims), ())

    def _choose_units(self, *_: object) -> Choice:
        return Choice([], torch.zeros(0, self.shape.intermediate_size), ())

    def _fit_pooler(self, *_: object) -> list[Tensor]:
        return []

    def _fit_unread(self) -> None:
        """Leave the layer as it is."""

    def _held(self, name: str, _transported: Callable[[], Tensor]) -> Held:
        module = self.target.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        return torch.zeros_like(module.weight, dtype=torch.float64), None

    def _held_features(self, _transported: Callable[[], Tensor]) -> Tensor:
        return torch.zeros(sum(self.union.widths), self.shape.hidden_size, dtype=torch.float64)
