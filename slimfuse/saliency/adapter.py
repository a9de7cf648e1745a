"""Our scores as torch-pruning's `Importance`: its pruners on any net it can trace.

torch-pruning hands over groups of coupled channels; taking one away takes it from all layers that
read it. So a group's mask multiplies what its readers read, and its gradient is the sum of theirs:
I = E_n (Σ_readers ∂L_n/∂mask)², times ½ and plus ½ λ|w|² of the readers' weights w: that is group
OBS ½ wᵀ([F⁻¹]_QQ)⁻¹ w with F = λI + E[g gᵀ] of the group's block (WoodFisher, arXiv 2004.14340).
A channel that nothing reads (a net's own output) is masked where it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.errors import UserError

try:
    from torch_pruning.pruner import function
    from torch_pruning.pruner.importance import Importance
except ImportError as error:  # optional: only this adapter needs it
    raise ImportError("slimfuse.saliency.adapter needs torch-pruning") from error

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
READS = (function.prune_linear_in_channels, function.prune_conv_in_channels)
WRITES = (function.prune_linear_out_channels, function.prune_conv_out_channels)
SampleLoss = Callable[[Any, Tensor], Tensor]
"""Losses (samples,) of what a net returned for a batch, and its labels."""


def per_channel(layer: nn.Module, values: Tensor, side: str) -> Tensor:
    """Return values of a layer's weights, summed over each "input" or "output" channel (1, n).

    A group of a convolution reads its own inputs only.
    """
    if side == "output":
        return values.flatten(1).sum(1)[None]
    grouped: Tensor = values.unflatten(0, (int(getattr(layer, "groups", 1)), -1))
    return grouped.sum([1, *range(3, grouped.ndim)]).reshape(1, -1)


class GroupImportance(Importance):  # type: ignore[misc]
    """Scores (channels,) of torch-pruning's groups of channels.

    A subclass says what each layer's channels have: values (samples, channels) of its inputs or
    outputs, which are added over a group's layers, and how the sums become scores.
    """

    def values(self, layer: nn.Module, side: str) -> Tensor:
        """Return values (samples, channels) of a layer's "input" or "output" channels."""
        raise NotImplementedError

    def weights(self, layer: nn.Module, side: str) -> Tensor:
        """Return |w|² (1, channels) of the weights that read or write each channel."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return per_channel(layer, weight.detach().double().cpu().square(), side)

    def settle(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return scores (channels,) of a group's sums of both."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Return the scores of a group's channels, float32; None where no layer is known."""
        sums: list[Tensor] | None = None
        for side, kinds in (("input", READS), ("output", WRITES)):
            for place, (dep, channels) in enumerate(group):
                layer = dep.layer
                if dep.pruning_fn not in kinds or not isinstance(layer, LAYERS):
                    continue
                if any(root is None for root in group[place].root_idxs):
                    continue  # channels that aren't the root's
                roots = torch.tensor(group[place].root_idxs)
                found = [f(layer, side)[:, channels] for f in (self.values, self.weights)]
                if sums is None:
                    size = len(group[0].idxs)
                    sums = [torch.zeros(len(f), size, dtype=torch.float64) for f in found]
                for total, own in zip(sums, found, strict=True):
                    total.index_add_(1, roots, own)
            if sums is not None:
                break  # what is read says all; only a net's own output is never read
        return None if sums is None else self.settle(sums[0], sums[1]).float()


class MaskFisherImportance(GroupImportance):
    """Mask Fisher, or with damping WoodFisher's group statistic, of every group of channels.

    Call `observe` with the net and labelled batches before the pruner's step, and again between
    the steps of a gradual schedule. loss: of every sample (samples,), cross-entropy by default.
    damping: λ relative to the group's mean Fisher along its weights, wᵀFw / |w|²; 0 is the mask
    Fisher itself, a large one ranks by magnitude.
    """

    def __init__(self, loss: SampleLoss | None = None, damping: float = 0.0) -> None:
        self.loss = loss or _cross_entropy
        self.damping = damping
        self.found: dict[tuple[nn.Module, str], Tensor] = {}

    def observe(self, net: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> None:
        """Take every sample's gradient of the channels' masks; net is left as it was.

        Dropout and batch norms are as in evaluation: samples mustn't mix.
        """
        layers: list[nn.Module] = [m for m in net.modules() if isinstance(m, LAYERS)]
        parts: dict[tuple[nn.Module, str], list[Tensor]] = {
            (layer, side): [] for layer in layers for side in ("input", "output")
        }
        training = net.training
        net.eval()
        try:
            for inputs, labels in batches:
                for key, gradient in self._backward(net, layers, inputs, labels).items():
                    parts[key].append(gradient)
        finally:
            net.train(training)
        if not any(parts.values()):
            raise UserError("there is no sample to take gradients of", where="saliency")
        self.found = {key: torch.cat(own) for key, own in parts.items() if own}

    def _backward(
        self, net: nn.Module, layers: list[nn.Module], inputs: Any, labels: Tensor
    ) -> dict[tuple[nn.Module, str], Tensor]:
        masks: dict[tuple[nn.Module, str], Tensor] = {}

        def masked(layer: nn.Module, side: str, x: Tensor) -> Tensor:
            dim = x.ndim - 1 if isinstance(layer, nn.Linear) else 1
            key = (layer, side)
            if key not in masks:
                ones = torch.ones(len(x), x.shape[dim], dtype=x.dtype, device=x.device)
                masks[key] = ones.requires_grad_()
            shape = [1] * x.ndim
            shape[0], shape[dim] = masks[key].shape
            return x * masks[key].view(shape)

        def before(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return (masked(layer, "input", given[0]), *given[1:])

        def after(layer: nn.Module, _given: Any, out: Tensor) -> Tensor:
            return masked(layer, "output", out)

        handles = [m.register_forward_pre_hook(before) for m in layers]
        handles += [m.register_forward_hook(after) for m in layers]
        try:
            with torch.enable_grad():
                losses = self.loss(net(inputs), labels)
                _check_rows(masks, len(losses))
                found = torch.autograd.grad(losses.sum(), list(masks.values()), allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return {
            key: (torch.zeros_like(mask) if g is None else g).detach().double().cpu()
            for (key, mask), g in zip(masks.items(), found, strict=True)
        }

    def values(self, layer: nn.Module, side: str) -> Tensor:
        """Return ∂L_n/∂mask (samples, channels)."""
        if (layer, side) not in self.found:
            raise UserError(
                "this layer's gradients weren't observed",
                where=type(layer).__name__,
                hint="call observe(net, batches) with the net that is pruned",
            )
        found = self.found[layer, side]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        size = (
            weight.shape[0] if side == "output" else weight.shape[1] * getattr(layer, "groups", 1)
        )
        if found.shape[1] != size:
            raise UserError(
                "the net was pruned since its gradients were observed",
                where=type(layer).__name__,
                hint="call observe(net, batches) before every step",
            )
        return found

    def settle(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return ½ (E_n (Σ ∂L_n/∂mask)² + λ|w|²)."""
        fisher = values.square().mean(0)
        size = weights[0].clamp_min(1e-300)
        return (fisher + self.damping * (fisher / size).mean() * weights[0]) / 2


class WeightImportance(GroupImportance):
    """Scores of single weights, such as WoodFisher's statistic, summed over a channel's readers.

    scores: by the parameters' names, each in its parameter's shape.
    """

    def __init__(self, net: nn.Module, scores: Mapping[str, Tensor]) -> None:
        modules = dict(net.named_modules())
        self.scores = {
            modules[name.rpartition(".")[0]]: value
            for name, value in scores.items()
            if name.endswith("weight")
        }

    def values(self, layer: nn.Module, side: str) -> Tensor:
        """Return the sum of a channel's weights' scores (1, channels)."""
        if layer not in self.scores:
            raise UserError(
                "this layer's weights have no scores",
                where=type(layer).__name__,
                allowed="scores of the weights of all linear and convolutional layers",
            )
        return per_channel(layer, self.scores[layer].double().cpu(), side)

    def settle(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return the sums."""
        return values[0]


def _check_rows(masks: Mapping[tuple[nn.Module, str], Tensor], samples: int) -> None:
    """Demand that what a layer sees has one row a sample: a mask multiplies a whole sample's."""
    for (layer, side), mask in masks.items():
        if len(mask) != samples:
            raise UserError(
                "a layer folds something else into the axis of samples",
                where=f"{side} of {layer}",
                got=f"{len(mask)} rows, {samples} losses",
                hint="score such a net by its weights (WeightImportance)",
            )


def _cross_entropy(output: Any, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels, reduction="none")
