"""Pruned plain nets: widths, the units that stay, and their costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimfuse.nets import (
    Classifier,
    MLPConfig,
    ResNetConfig,
    VGGConfig,
    build,
    footprint,
    load,
    load_config,
    prune,
    pruned_config,
)

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "config",
    [
        MLPConfig(192, (12, 7)),
        VGGConfig(3, 8, (5, "M", 9, 7), (6,), batch_norm=True),
        ResNetConfig(3, (8, 6), (1, 2), (5, 3, 7)),
    ],
    ids=lambda config: config.architecture,
)
def test_a_pruned_net_has_the_config_that_was_foretold(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(2, 3, 8, 8)
    dense = build(config)
    before = dense(example)
    slim_config = pruned_config(config, example, 0.5)
    slim = Classifier(prune(dense, example, 0.5), slim_config)
    assert torch.equal(dense(example), before), "the dense net stays as it was"
    assert all(0 < s < d for s, d in zip(slim_config.widths, config.widths, strict=True))
    slim.save_pretrained(tmp_path)
    assert load_config(tmp_path) == slim_config
    assert torch.equal(load(tmp_path)(example), slim(pixel_values=example).logits)


def test_pruning_keeps_the_units_of_largest_norm() -> None:
    net = build(MLPConfig(12, (5,), 3))
    first = net.layers[0]
    with torch.no_grad():
        first.weight.copy_(torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])[:, None].expand(5, 12))
        net.layers[2].weight.fill_(1.0)
        first.bias.zero_()
    slim = prune(net, torch.zeros(2, 1, 3, 4), 0.4)
    assert slim.layers[0].weight[:, 0].tolist() == [3.0, 5.0, 4.0]


def test_a_footprint_is_counted_as_by_hand() -> None:
    found = footprint(MLPConfig(192, (12, 7), 10), 8)
    assert found.params == 193 * 12 + 13 * 7 + 8 * 10
    assert found.flops == 2 * (192 * 12 + 12 * 7 + 7 * 10)
    # flattened pixels, two layers each with its ReLU, logits
    assert (found.activations, found.outputs) == (192 + 2 * 12 + 2 * 7 + 10, 10)
    conv = footprint(VGGConfig(3, 8, (4, "M"), (), 10), 8)
    assert conv.flops == 2 * (64 * 27 * 4 + 64 * 10)
