"""In which order a model's blocks are seen, and which are decided together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimfuse.saliency.fisher import Part, plan
from slimfuse.saliency.inverse import Route
from slimfuse.saliency.patterns import Layer
from slimfuse.saliency.sparsify_spec import Spec


def units(
    layers: Sequence[Layer], spec: Spec, samples: int, route: Route | None, itemsize: int
) -> list[list[list[Part]]]:
    """Return the passes over the gradients by what is decided together.

    That are all layers (joint), or those that share a pass. route: None where no gradient is
    needed, which is one pass. itemsize: bytes of a number of the sums.
    """
    block = spec.block or max(layer.size for layer in layers)
    block = -(-block // spec.pattern.size) * spec.pattern.size
    if route is None:
        passes = [[_whole(layer, min(block, layer.size)) for layer in layers]]
    else:
        passes = plan(layers, block, samples, route, memory=spec.memory, itemsize=itemsize)
    if spec.compares_layers:
        return [passes]
    found: list[list[list[Part]]] = []
    for parts in passes:
        if found and found[-1][-1][-1].layer == parts[0].layer:  # a layer that was cut
            found[-1].append(parts)
        else:
            found.append([parts])
    return found


def _whole(layer: Layer, block: int) -> Part:
    return Part(layer, block, 0, -(-layer.size // block))


def joined(parts: Mapping[str, Tensor], layer: Layer) -> Tensor:
    """Return what a layer's parts have, one after the other."""
    own = [(int(k.rpartition(":")[2]), v) for k, v in parts.items() if of(k, layer)]
    return torch.cat([v for _, v in sorted(own, key=lambda pair: pair[0])])


def of(key: str, layer: Layer) -> bool:
    """Whether a part's key is one of a layer."""
    return key.rpartition(":")[0] == layer.name
