"""A net behind the interface of an image classifier: named pixels in, `.logits` out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slimfuse.errors import ParentError, first_line
from slimfuse.nets.zoo import Config, build, load, load_config, save

CHANNELS = 3  # every image processor here makes RGB


@dataclass
class Outputs:
    """What a classifier returns: logits (batch, classes)."""

    logits: Tensor


class Classifier(nn.Module):
    """A net with its config that is called and saved as transformers' classifiers are."""

    def __init__(self, net: nn.Module, config: Config) -> None:
        super().__init__()
        self.net, self.config = net, config

    def forward(self, pixel_values: Tensor) -> Outputs:
        """Return the logits of images (batch, channels, height, width)."""
        return Outputs(self.net(pixel_values))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save(self.net, self.config, folder)


def new_classifier(config: Config) -> Classifier:
    """Return a randomly initialised classifier in evaluation mode."""
    return Classifier(build(config), config).eval()


def load_classifier(folder: str | Path) -> Classifier:
    """Return a saved classifier in evaluation mode and float32; raises ParentError."""
    return Classifier(load(folder), load_config(folder)).float().eval()


@dataclass(frozen=True)
class Footprint:
    """What one image costs a net. flops: 2 per multiply-add; activations: values its layers make.

    outputs: the number of logits.
    """

    params: int
    flops: int
    activations: int
    outputs: int


def footprint(config: Config, image_size: int) -> Footprint:
    """Return what images of this side cost a net; no memory is taken for it.

    Raises ParentError when the net doesn't take such images.
    """
    made = 0

    def count(module: nn.Module, args: object, output: Tensor) -> None:
        nonlocal made
        made += output.numel()

    with torch.device("meta"):
        net = build(config)
        image = torch.zeros(1, CHANNELS, image_size, image_size)
        for module in net.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                logits = net(image)
        except RuntimeError as error:
            raise ParentError(
                "the net doesn't take the data's images",
                got=first_line(error),
                allowed=f"{CHANNELS} × {image_size} × {image_size}",
            ) from error
    params = sum(p.numel() for p in net.parameters())
    return Footprint(params, int(counter.get_total_flops()), made, int(logits.shape[-1]))
