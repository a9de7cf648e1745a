"""What may be pruned, and in what patterns: single weights, N of every M, blocks of a matrix.

A pattern lays a layer's weights out flat so that the weights of one group lie side by side; the
blocks of the Fisher follow that order, rounded up to whole groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from slimfuse.errors import ShapeError, UserError
from slimfuse.saliency.inverse import runs

# where the weights of a module have its inputs; transformers' Conv1D is a transposed linear layer
INPUT_AXIS: dict[str, int] = {"Linear": 1, "Conv1d": 1, "Conv2d": 1, "Conv3d": 1, "Conv1D": 0}

NAMED = 4  # layers in an error


@dataclass(frozen=True)
class Layer:
    """A weight that may be pruned: its parameter's name, shape, and the axis of its inputs."""

    name: str
    shape: tuple[int, ...]
    input_axis: int

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


def prunable(
    model: nn.Module, *, only: Sequence[str] = ("*",), leave_out: Sequence[str] = ()
) -> list[Layer]:
    """Return the weights of linear and convolution layers, in the model's order.

    only, leave_out: shell patterns of parameter names ("*.query.weight"). A weight that embeddings
    share is left out: pruning it would prune tokens. Raises UserError when nothing is left.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    owners = dict(model.named_modules())
    found = []
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        axis = _input_axis(owners[owner])
        if leaf != "weight" or axis is None or id(parameter) in tables:
            continue
        if any(fnmatch(name, p) for p in only) and not any(fnmatch(name, p) for p in leave_out):
            found.append(Layer(name, tuple(parameter.shape), axis))
    if not found:
        raise UserError(
            "no layer is left to prune",
            where="layers",
            got=f"only {', '.join(only)}; leave out {', '.join(leave_out) or 'nothing'}",
            allowed="weights of linear and convolution layers that no embedding shares",
        )
    return found


def _input_axis(module: nn.Module) -> int | None:
    return next((INPUT_AXIS[c.__name__] for c in type(module).__mro__ if c.__name__ in INPUT_AXIS),
                None)  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """Groups of `rows` outputs × `columns` inputs; each goes whole, or keeps `keep` weights.

    1 × 1: unstructured. Convolutions are seen as matrices (outputs, kernel places × inputs), so
    that columns are neighbouring input channels.
    """

    rows: int = 1
    columns: int = 1
    keep: int | None = None

    @property
    def size(self) -> int:
        """Weights in a group."""
        return self.rows * self.columns

    @property
    def sparsity(self) -> float | None:
        """The share of zeros where the pattern itself says it."""
        return None if self.keep is None else 1 - self.keep / self.size

    def __str__(self) -> str:
        if self.keep is not None:
            return f"{self.keep}:{self.columns}"
        return "unstructured" if self.size == 1 else f"{self.rows}x{self.columns}"

    def check(self, layers: Sequence[Layer]) -> None:
        """Raise ShapeError that names layers that aren't made of whole groups."""
        bad = [
            f"{layer.name} {layer.shape}"
            for layer in layers
            if self.size > 1 and (self._outputs(layer) % self.rows or self._inputs(layer)
                                  % self.columns)
        ]  # fmt: skip
        if bad:
            more = [f"{len(bad) - NAMED} more"] if len(bad) > NAMED else []
            raise ShapeError(
                f"layers can't be cut into groups of the pattern {self}",
                got="; ".join(bad[:NAMED] + more),
                allowed=f"outputs in {self.rows}s and inputs in {self.columns}s",
                hint="leave these layers out",
            )

    def flat(self, layer: Layer, values: Tensor) -> Tensor:
        """Return values (k, *shape) as rows (k, size) in the pattern's order."""
        if self.size == 1:
            return values.reshape(len(values), -1)
        matrix = values.movedim(1 + layer.input_axis, -1)
        matrix = matrix.reshape(len(values), self._outputs(layer), -1)
        tiles = runs(runs(matrix, 2, self.columns), 1, self.rows)
        return tiles.transpose(2, 3).reshape(len(values), -1)

    def back(self, layer: Layer, flat: Tensor) -> Tensor:
        """Return a flat row (size,) as a tensor of the layer's shape; undoes `flat`."""
        if self.size == 1:
            return flat.view(layer.shape)
        outputs, inputs = self._outputs(layer), layer.size // self._outputs(layer)
        tiles = flat.view(outputs // self.rows, inputs // self.columns, self.rows, self.columns)
        moved = [s for i, s in enumerate(layer.shape) if i != layer.input_axis]
        matrix = tiles.transpose(1, 2).reshape(*moved, layer.shape[layer.input_axis])
        return matrix.movedim(-1, layer.input_axis).contiguous()

    def _inputs(self, layer: Layer) -> int:
        return layer.shape[layer.input_axis]

    def _outputs(self, layer: Layer) -> int:
        return layer.shape[1 - layer.input_axis]


UNSTRUCTURED = Pattern()


def parse_pattern(text: str) -> Pattern:
    """Return the pattern of "unstructured", "N:M" (N of every M inputs stay) or "ROWSxCOLUMNS"."""
    if text == "unstructured":
        return UNSTRUCTURED
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        keep, of = map(int, found.groups())
        if 0 < keep < of:
            return Pattern(1, of, keep)
    elif (found := re.fullmatch(r"(\d+)x(\d+)", text)) and "0" not in found.groups():
        return Pattern(int(found[1]), int(found[2]))
    raise UserError(
        "unknown pattern of zeros",
        where="pattern",
        got=text,
        allowed='"unstructured", "2:4" (2 of every 4 inputs stay), "4x1" (outputs x inputs)',
    )


def lowest(
    scores: Mapping[str, Tensor], gone: Mapping[str, Tensor], share: float, *, joint: bool
) -> dict[str, Tensor]:
    """Return which groups go (bool, like the scores): the `share` of lowest score, exactly.

    joint: one ranking over all layers, else one a layer. gone: groups that went before; they stay
    gone and count. Equal scores go in order.
    """
    ranked = {name: values.masked_fill(gone[name], -math.inf) for name, values in scores.items()}
    if not joint:
        return {name: _first(values, share) for name, values in ranked.items()}
    removed = _first(torch.cat(list(ranked.values())), share)
    sizes = [len(values) for values in ranked.values()]
    return dict(zip(ranked, removed.split(sizes), strict=True))


def _first(values: Tensor, share: float) -> Tensor:
    """Return the round(share · n) lowest values as a mask (n,)."""
    count = round(share * len(values))
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = values.kthvalue(count).values
    removed = values < limit
    ties = (values == limit).nonzero()[:, 0]
    removed[ties[: count - int(removed.sum())]] = True
    return removed
