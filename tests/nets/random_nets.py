"""Random plain nets of every kind, moved and widened."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slimfuse.nets import (
    Config,
    MLPConfig,
    ResNetConfig,
    VGGConfig,
    build,
)
from slimfuse.nets.graph import floating

CONFIGS: dict[str, Config] = {
    "mlp": MLPConfig(12, (7, 5), 3),
    "vgg": VGGConfig(1, 8, (3, "M", 5, 7, "M"), (6,), 4),
    "vgg-bn": VGGConfig(2, 9, (3, "M", 5, "M"), (), 3, batch_norm=True),
    "resnet": ResNetConfig(1, (4, 6), (1, 2), (5, 3, 7), 3),
}
each_net = pytest.mark.parametrize("name", CONFIGS)


def images(config: Config, count: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(config, MLPConfig):
        shape: tuple[int, ...] = (count, 1, 3, config.inputs // 3)
    else:
        side = config.image_size if isinstance(config, VGGConfig) else 8
        shape = (count, config.channels, side, side)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def random_net(config: Config, seed: int = 0) -> nn.Module:
    """A float64 net with random weights, gains, biases and statistics."""
    torch.manual_seed(seed)
    net = build(config).double()
    with torch.no_grad():
        for name, value in floating(net.state_dict()).items():
            if value.ndim == 1:
                centred = name.endswith(("bias", "running_mean"))
                value.copy_(torch.rand_like(value) + (-0.5 if centred else 0.5))
    return net


def outputs(net: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(inputs)
