"""Parameter isolation: updates of linear layers that leave protected answers as they are.

With [x; 1] what a linear layer reads and ΔW its update (bias behind the weights), the layer's
answers stay where ΔW·U = 0, U spanning its inputs on the protected samples. Where every linear
layer's update is so and nothing else moves, by induction over the layers the whole model's answers
on those samples stay, whatever the optimizer did. So it is the realised update that is projected,
not the gradient: moments and weight decay would undo the latter.
Source: arXiv 2310.01165; diagnostics.md §3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimfuse.batch import Batches, Inputs, call, token_mask
from slimfuse.errors import UserError

EXACT = 8  # singular values below so many roundings of the largest are none, in the inputs' type


class SquareRoot:
    """The triangular root R of a streamed second moment: RᵀR = Σ x xᵀ.

    In its singular values a direction counts from 1e-16 of the largest on, in the eigenvalues of
    the moment itself only from 1e-8: a lost direction would break the promise of full energy.
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self._root = torch.zeros(0, width, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Add rows (n, width)."""
        self.count += len(rows)
        self._waiting.append(rows.detach().double().cpu())
        if sum(map(len, self._waiting)) >= 2 * self.width:
            self._add()

    def _add(self) -> None:
        stacked = torch.cat([self._root, *self._waiting])
        self._waiting = []
        self._root = torch.linalg.qr(stacked, mode="r").R

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return the singular values (width,), descending, and the directions (width, width)."""
        if self._waiting:
            self._add()
        padded = torch.zeros(self.width, self.width, dtype=torch.float64)
        padded[: len(self._root)] = self._root
        _, values, directions = torch.linalg.svd(padded)
        return values, directions.T.contiguous()


@dataclass(frozen=True)
class Subspace:
    """What one or more linear layers read on the protected samples.

    layers: their paths; bias: whether they read [x; 1]; directions: orthonormal (n, k) that are
    protected, or (n, n - k) that are free where those are fewer (`free`).
    """

    layers: tuple[str, ...]
    bias: bool
    directions: Tensor
    free: bool

    @property
    def width(self) -> int:
        """How many numbers the layers read, n."""
        return len(self.directions)

    @property
    def rank(self) -> int:
        """k: how many directions are protected."""
        own = self.directions.shape[1]
        return self.width - own if self.free else own

    @property
    def plasticity(self) -> float:
        """1 - k/n: the share of directions in which the layers may still move."""
        return 1 - self.rank / self.width

    def project(self, update: Tensor) -> Tensor:
        """Return the part of an update (out, n) that changes no protected answer."""
        own = self.directions.to(update)
        along = (update @ own) @ own.T
        return along if self.free else update - along


def protectable(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers by path, without those that share a weight with another module."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and owners[module.get_parameter("weight")] == 1
    }


def subspaces(
    model: nn.Module,
    batches: Batches,
    *,
    energy: float = 1.0,
    tell: Callable[[int], object] = lambda count: None,
) -> tuple[Subspace, ...]:
    """Return what the linear layers read on some samples, in evaluation mode.

    batches: gives the protected samples; tokens that only pad don't count. energy: the share of
    Σ|x|² that is kept, 0 < energy ≤ 1; 1 is the exact rank, and a dial below it. tell: takes how
    many samples were seen, after each batch. Layers of one input (as queries, keys and values)
    share a subspace; a layer that the samples don't reach has none. Memory: n² float64 numbers for
    each distinct input. Raises UserError for an energy out of range.
    """
    if not 0 < energy <= 1:
        raise UserError("not a share of energy", where="energy", got=energy, allowed="0 < e ≤ 1")
    layers, like = protectable(model), next(model.parameters())
    roots: dict[tuple[str, ...], SquareRoot] = {}
    first: dict[str, SquareRoot] = {}  # by the layer that is watched for its group
    was, count = model.training, 0
    model.eval()
    with torch.no_grad():
        for inputs in batches():
            given = inputs.to(like.device, like.dtype)
            mask = token_mask(given)
            if not roots:
                roots = {
                    group: SquareRoot(_width(layers[group[0]])) for group in _groups(model, given)
                }
                first = {group[0]: root for group, root in roots.items()}
            with _watching(
                {name: layers[name] for name in first}, partial(_add, first, layers, mask)
            ):
                call(model, given)
            count += len(inputs)
            tell(count)
    model.train(was)
    return tuple(
        _subspace(group, layers[group[0]], root, energy, like.dtype)
        for group, root in roots.items()
    )


def _add(
    roots: Mapping[str, SquareRoot],
    layers: Mapping[str, nn.Module],
    mask: Tensor | None,
    name: str,
    given: Tensor,
) -> None:
    roots[name].update(_rows(given, mask, layers[name]))


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Tell what each layer reads."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, given: add(name, given[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(model: nn.Module, inputs: Inputs) -> list[tuple[str, ...]]:
    """Return the layers by what they read; one that is used more than once stands alone."""
    layers, seen = protectable(model), list[tuple[str, Tensor]]()
    with _watching(layers, lambda name, given: seen.append((name, given))):  # and keep it alive
        call(model, inputs)
    names = [name for name, _ in seen]
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, given in seen:
        alone = names.count(name) > 1
        bias = _bias(layers[name]) is not None
        key = (name,) if alone else (given.data_ptr(), given.shape, given.stride(), bias)
        groups.setdefault(key, []).append(name)
    return [tuple(dict.fromkeys(group)) for group in groups.values()]


def _bias(layer: nn.Module) -> nn.Parameter | None:
    return layer.get_parameter("bias") if getattr(layer, "bias", None) is not None else None


def _width(layer: nn.Module) -> int:
    """Return how many numbers a layer reads, with the 1 of its bias."""
    weight = layer.get_parameter("weight")
    return weight.shape[0 if isinstance(layer, Conv1D) else 1] + (_bias(layer) is not None)


def _rows(given: Tensor, mask: Tensor | None, layer: nn.Module) -> Tensor:
    """Return what a layer reads as rows (n, width), without those of tokens that only pad."""
    if mask is not None and given.shape[: mask.ndim] == mask.shape:
        given = given[mask]
    rows = given.reshape(-1, given.shape[-1]).double()
    if _bias(layer) is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    return rows


def _subspace(
    group: tuple[str, ...], layer: nn.Module, root: SquareRoot, energy: float, dtype: torch.dtype
) -> Subspace:
    values, directions = root.spectrum()
    width = root.width
    least = max(width * torch.finfo(torch.float64).eps, EXACT * torch.finfo(dtype).eps)
    rank = int((values > least * values[0]).sum())
    if energy < 1:
        kept = values.square().cumsum(0) / values.square().sum()
        rank = min(rank, int((kept < energy).sum()) + 1)
    free = 2 * rank > width
    own = directions[:, rank:] if free else directions[:, :rank]
    return Subspace(group, _bias(layer) is not None, own.contiguous(), free)


class Protection:
    """Keeps a training where it doesn't change protected answers; a `Constraint` of the loop.

    The weights at every step are the start's plus the projected change since then, so that neither
    weight decay, moments nor rounding add up, and an average of such weights is one itself.
    """

    def __init__(self, model: nn.Module, spaces: Sequence[Subspace]) -> None:
        """Take the model as it starts, and what its layers read on the protected samples."""
        self.spaces = tuple(spaces)
        own = {
            _named(layer, kind)
            for space in self.spaces
            for layer in space.layers
            for kind in (("weight", "bias") if space.bias else ("weight",))
        }
        self.start = {
            name: p.detach().clone() for name, p in model.named_parameters() if name in own
        }

    @property
    def plasticity(self) -> float:
        """The share of all weights' directions in which the protected model may still move."""
        sizes = {s: sum(self._outputs(layer) for layer in s.layers) for s in self.spaces}
        total = sum(rows * s.width for s, rows in sizes.items())
        return sum(rows * (s.width - s.rank) for s, rows in sizes.items()) / max(1, total)

    def _outputs(self, layer: str) -> int:
        bias = self.start.get(_named(layer, "bias"))
        weight = self.start[_named(layer, "weight")]
        return len(bias) if bias is not None else len(weight)

    def apply(self, model: nn.Module) -> None:
        """Freeze all that isn't projected: norms, tables, convolutions, shared weights."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.start)

    @torch.no_grad()
    def apply_gradients(self, model: nn.Module) -> None:
        """Project the gradients, so that the norm that is clipped is of what may move."""
        for space in self.spaces:
            for layer in space.layers:
                module = model.get_submodule(layer)
                weight, bias = module.get_parameter("weight").grad, _bias(module)
                slope = None if bias is None else bias.grad
                if weight is None or (bias is not None and slope is None):
                    continue  # what nothing reads
                _put(module, space.project(_joined(module, weight, slope)), weight, slope)

    def holding(self, model: nn.Module) -> Callable[[], None]:
        """Return what projects the weights' change since the start, after a step."""
        device = next(model.parameters()).device
        start = {name: value.to(device) for name, value in self.start.items()}
        spaces = [replace(s, directions=s.directions.to(device)) for s in self.spaces]

        @torch.no_grad()
        def hold() -> None:
            for space in spaces:
                for layer in space.layers:
                    module = model.get_submodule(layer)
                    weight, bias = module.get_parameter("weight"), _bias(module)
                    first = start[_named(layer, "weight")]
                    before = start.get(_named(layer, "bias"))
                    moved = None if bias is None or before is None else bias - before
                    _put(
                        module, space.project(_joined(module, weight - first, moved)), weight, bias
                    )
                    weight.add_(first)
                    if bias is not None and before is not None:
                        bias.add_(before)

        return hold


def _named(layer: str, kind: str) -> str:
    return f"{layer}.{kind}" if layer else kind


def _joined(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [weight, bias] of a layer (out, n)."""
    rows = weight.T if isinstance(layer, Conv1D) else weight
    return rows if bias is None else torch.cat([rows, bias[:, None]], 1)


def _put(layer: nn.Module, joined: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write what `_joined` made back into its parts."""
    rows = joined if bias is None else joined[:, :-1]
    weight.copy_(rows.T if isinstance(layer, Conv1D) else rows)
    if bias is not None:
        bias.copy_(joined[:, -1])


def mixed(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """Return (Σ W_p A_p)(Σ A_p)⁻¹ (out, n): one layer for the tasks of several parents.

    weights: W_p (out, n), all in one basis of inputs; moments: A_p = E[x xᵀ] (n, n) of each
    parent's own inputs, weighted as the tasks count. It minimises Σ_p E|W x - W_p x|², the
    quadratic by which forgetting is forecast; where no parent's inputs go, it is zero.
    Source: diagnostics.md §3.
    """
    total = torch.stack([a.double() for a in moments]).sum(0)
    goal = torch.stack([w.double() @ a.double() for w, a in zip(weights, moments, strict=True)])
    inverse: Tensor = torch.linalg.pinv((total + total.T) / 2, hermitian=True)
    return goal.sum(0) @ inverse
