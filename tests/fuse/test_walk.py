"""Walking a model block by block gives what the stock class gives in one go."""

from __future__ import annotations

from typing import Any

import torch
from tiny import images, logits

from slimfuse.families import ViT
from slimfuse.fuse import walk

SAME = {"rtol": 0, "atol": 1e-12}  # float64, the same sums in the same order


def test_the_streams_are_the_stock_models_hidden_states(vit: Any) -> None:
    layout, x = ViT().layout(vit.config), images(3)
    with torch.no_grad():
        found = list(walk.streams(vit, layout, x))
        want = vit(pixel_values=x, output_hidden_states=True).hidden_states
    assert len(found) == 1 + 2 * len(layout.blocks)
    for ours, theirs in zip(found[::2], want, strict=True):
        torch.testing.assert_close(ours, theirs, **SAME)


def test_the_readout_is_what_the_head_turns_into_logits(vit: Any) -> None:
    layout, x = ViT().layout(vit.config), images(3)
    with torch.no_grad():
        *_, last = walk.streams(vit, layout, x)
        top = walk.read_out(vit, layout, last)
        found = walk.apply(vit, layout.head, top)
    torch.testing.assert_close(found, logits(vit, x), **SAME)


def test_watching_leaves_no_hook_behind(vit: Any) -> None:
    layout, x = ViT().layout(vit.config), images(3)
    with torch.no_grad():
        list(walk.streams(vit, layout, x))
    assert not any(m._forward_pre_hooks for m in vit.modules())
