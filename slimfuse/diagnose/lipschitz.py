"""How far answers move with their inputs: largest slopes on samples, and what layers amplify.

Of transformers only the lower bound: dot-product attention has no global one, so that a product of
layers' norms would be none. Of MLPs and CNNs the sandwich lower ≤ true ≤ Π‖W‖.
Source: arXiv 2302.10886; diagnostics.md §5, §7.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimfuse.diagnose.answers import Kind, Labelled, Read, flat
from slimfuse.diagnose.probing import Patience, only, probe
from slimfuse.diagnose.spectrum import reading

ITERATIONS = 8


def slopes_of(
    function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = ITERATIONS, seed: int = 0
) -> Tensor:
    """Return ‖J_x‖₂ of each sample (samples,), from below, by power iteration.

    function: takes x (samples, …) to answers (samples, …), each from its own sample alone.
    Cost: one forward- and one reverse-mode pass for each iteration.
    """
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    direction = _unit(noise.to(x))
    found = x.new_zeros(len(x))
    # without grad the weights' own graph isn't kept from one iteration to the next
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.* is deprecated", DeprecationWarning)
        for _ in range(iterations):
            _, pushed, *_ = torch.func.jvp(function, (x,), (direction,))
            found = torch.maximum(found, pushed.flatten(1).norm(dim=1))
            _, pull, *_ = torch.func.vjp(function, x)
            direction = _unit(pull(pushed)[0])
    return found.detach()


def _unit(x: Tensor) -> Tensor:
    norms = x.flatten(1).norm(dim=1).clamp_min(1e-30)
    found: Tensor = x / norms.view(-1, *([1] * (x.ndim - 1)))
    return found


def convolution_norm(weight: Tensor, size: Sequence[int]) -> float:
    """Return the largest singular value of a convolution that wraps around its input.

    weight: (out, in, …); size: of the input's axes. At each frequency the layer is a matrix
    (out, in): Sedghi et al. 2019 (arXiv 1805.10408). Zero padding has no more than that.
    """
    axes = tuple(range(2, weight.ndim))
    spectrum = torch.fft.fftn(weight.detach().double(), s=tuple(size), dim=axes)
    matrices = spectrum.flatten(2).permute(2, 0, 1)
    return float(torch.linalg.matrix_norm(matrices, ord=2).max())


def product_bound(model: nn.Sequential, size: Sequence[int] = ()) -> float:
    """Return Π‖W‖ of linear layers, convolutions of stride 1 and activations of slope 1 at most.

    size: of the input of every convolution's axes, which padding keeps. Raises AssertionError for
    other layers: there the product bounds nothing.
    """
    factors = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().double()
            factors.append(float(torch.linalg.matrix_norm(weight, ord=2)))
        elif isinstance(layer, nn.Conv1d | nn.Conv2d):
            assert set(layer.stride) == {1}, "of stride 1"
            grown = [n + k - 1 for n, k in zip(size, layer.kernel_size, strict=True)]
            factors.append(convolution_norm(layer.weight, grown))
        else:
            known = (nn.ReLU, nn.Tanh, nn.Flatten, nn.Identity, nn.LeakyReLU, nn.Sigmoid)
            assert isinstance(layer, known), f"{type(layer).__name__} has no bound here"
    return prod(factors)


def amplifications(
    model: nn.Module,
    batches: Iterable[Labelled],
    blocks: Sequence[str],
    kind: Kind,
    read: Read = flat,
    *,
    seed: int = 0,
    patience: Patience | None = None,
) -> tuple[list[float], int]:
    """Return κ of every block's input, and how many samples that is of.

    κ² = E tr(J_lᵀ H J_l)/numbers · E|x_l|²: twice the divergence of the answers, in nats a sample,
    by noise of one x_l in size all together, per square of its relative size. A block whose
    reconstruction misses a share e of its stream's energy costs about ½ κ² e.
    """
    generator = torch.Generator().manual_seed(seed)
    sites, count = {path: path for path in blocks}, 0
    energy, slope, numbers = (torch.zeros(len(blocks), dtype=torch.float64) for _ in range(3))
    for given in (patience or Patience()).over(batches):
        with reading(model, sites) as seen, only(model), torch.enable_grad():
            value = probe(model, given, kind, generator, read)
            found = torch.autograd.grad(value, list(seen.values()))
        count += len(given[0])
        for i, (x, g) in enumerate(zip(seen.values(), found, strict=True)):
            energy[i] += float(x.detach().double().square().sum())
            slope[i] += float(g.double().square().sum())
            numbers[i] = x[0].numel()
    squared = slope / count / numbers * energy / count
    return squared.sqrt().tolist(), count
