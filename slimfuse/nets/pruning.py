"""Structural pruning: whole units go, with everything that writes and reads them."""

from __future__ import annotations

import copy

import torch_pruning as tp
from torch import Tensor, nn

from slimfuse.errors import ShapeError
from slimfuse.nets.graph import graph_of
from slimfuse.nets.zoo import Config, build, narrow


def prune(net: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """Return a copy of a zoo net without the `ratio` of every space's units of least L1 norm.

    Units that are pruned together (a residual stream's) share one score. `net` stays as it is.
    Source: Li et al. 2017 (arXiv 1608.08710) on the groups of Fang et al. 2023 (2301.12900).
    """
    slim = copy.deepcopy(net)
    head = [m for m in slim.modules() if isinstance(m, nn.Linear)][-1]
    tp.pruner.MagnitudePruner(
        slim, example, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=ratio,
        ignored_layers=[head], forward_fn=lambda m, x: m(x),
    ).step()  # fmt: skip
    if ratio > 0 and _sizes(slim) == _sizes(net):
        raise ShapeError(
            "nothing is left to prune at this ratio: a layer would lose all its units",
            where="pruned.ratio",
            got=ratio,
            hint="take a smaller ratio",
        )
    return slim.eval()


def pruned_config(config: Config, example: Tensor, ratio: float) -> Config:
    """Return the config of a net of `config` after `prune`; sizes don't depend on its weights."""
    atlas = graph_of(prune(build(config), example, ratio), example).atlas
    return narrow(config, [atlas.spaces[space].size for space in atlas.free])


def _sizes(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in net.parameters()]
