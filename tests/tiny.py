"""Tiny models and helpers that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.families import ViT
from slimfuse.spaces import NestedMap, transform
from slimfuse.transport import TransportMap, from_plan

torch.set_num_threads(1)


def vit_config(**sizes: Any) -> Any:
    """Return a tiny ViT config with odd, distinct sizes."""
    from transformers import ViTConfig

    return ViTConfig(
        **{
            "hidden_size": 15,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 17,
            "image_size": 6,
            "patch_size": 2,
            "num_channels": 3,
            "num_labels": 7,
            **sizes,
        }
    )


def shake(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter random values, norms and biases too, so that no test is blind."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            fan = p.shape[-1] if p.ndim > 1 else 4
            norm_gain = "layernorm" in name and name.endswith("weight")
            p.copy_((1 + 0.2 * noise) if norm_gain else noise / fan**0.5)
    return model


def random_vit(seed: int = 0, **sizes: Any) -> nn.Module:
    """Return a random float64 ViT in evaluation mode."""
    return shake(ViT().build(vit_config(**sizes)).double(), seed)


def images(n: int, seed: int = 1) -> Tensor:
    """Return float64 images (n, 3, 6, 6)."""
    return torch.randn(
        n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the model's logits."""
    with torch.no_grad():
        out: Tensor = model(pixel_values=pixels).logits
    return out


def duplicate(size: int, copies: int = 2) -> TransportMap:
    """Return the plan that splits every unit into equal copies, interleaved."""
    plan = torch.zeros(size, size * copies, dtype=torch.float64)
    for i in range(size):
        plan[i, i * copies : (i + 1) * copies] = 1 / (size * copies)
    return from_plan(plan)


def reverse(tmap: TransportMap) -> TransportMap:
    """Return the same coupling seen from the other side."""
    return from_plan(tmap.plan.T.contiguous())


def permute(size: int, seed: int) -> TransportMap:
    """Return a random permutation as a plan."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return from_plan(torch.eye(size, dtype=torch.float64)[order] / size)


def moved(model: nn.Module, maps: dict[str, Any], **sizes: Any) -> nn.Module:
    """Return the model moved through `maps`; `sizes` are those of the config that change."""
    family = ViT()
    config = model.config
    new = vit_config(**{**config.to_diff_dict(), **sizes})
    out = family.build(new).double()
    state = transform(model.state_dict(), family.atlas(config), maps)
    for name, value in state.items():
        if "q_proj" in name:
            value *= family.query_scale(config, new)
    out.load_state_dict(state)
    return out


Mapper = Callable[[int, int], TransportMap]


def maps_of(model: nn.Module, spaces: tuple[str, ...], make: Mapper) -> dict[str, Any]:
    """Return a map for every space whose name starts with one of `spaces`.

    Maps inside heads differ from head to head.
    """
    atlas = ViT().atlas(model.config)
    heads = model.config.num_attention_heads
    out: dict[str, Any] = {}
    for seed, name in enumerate(n for n in atlas.free if n.split(".")[0] in spaces):
        size = atlas.spaces[name].size
        if atlas.spaces[name].kind in ("qk", "vo"):
            out[name] = NestedMap([make(size, 100 * seed + h) for h in range(heads)])
        else:
            out[name] = make(size, 100 * seed)
    return out


class Counting(nn.Module):
    """A model whose loss is its answer to samples' numbers, with statistics that a pass changes."""

    def __init__(self, samples: int = 23) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.line = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.given = torch.randn(samples, 4)

    def forward(self, indices: Tensor) -> Tensor:
        out: Tensor = self.line(self.norm(self.given[indices]))
        return (out - 1).square().mean()
