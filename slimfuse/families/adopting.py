"""Families of images that open each other's saved models, where the mathematics is the same.

timm's ViT and Hugging Face's are one function with other names. A model of a sibling family is
*adopted*: a model of the own class gets its weights, path by path, and any difference that the
own class can't express is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.errors import ParentError
from slimfuse.families.base import Layout
from slimfuse.families.encoder import ImageEncoder

PARTS = ("q", "k", "v", "o", "up", "down", "attention_norm", "mlp_norm")
TIMM = "timm-vit"
USUAL_EPS = 1e-6
"""timm's, and transformers' is smaller: beside a stream's variance both are nothing in float32."""
Facts = dict[str, Any]


class Adopting(ImageEncoder):
    """An image family with siblings, whose saved models it opens as its own.

    siblings: families of the same task, by name.
    """

    siblings: Mapping[str, Adopting] = {}

    def load_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved model, a sibling's as this family says it."""
        other = self._sibling(Path(folder))
        if other is None:
            return self.read_own_config(folder, revision)
        return self.adopted_config(other.read_own_config(folder, revision), other, folder)

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model in evaluation mode, a sibling's as one of the own class."""
        other = self._sibling(Path(folder))
        if other is None:
            return self.read_own(folder, attention=attention, revision=revision)
        model = other.load(folder, revision=revision)
        return self.adopt(model, other, attention=attention, where=str(folder))

    def read_own_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved model of the own class."""
        return super().load_config(folder, revision)

    def read_own(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model of the own class."""
        return super().load(folder, attention=attention, revision=revision)

    def before_patches(self, config: Any) -> tuple[str, ...]:
        """Return the names of the tokens before the patches."""
        return self.own_tokens

    def adopted_config(self, config: Any, other: Adopting, where: str = "") -> Any:
        """Return a sibling's config as this family says it; ParentError for what it can't say."""
        labels = [label for _, label in sorted(config.id2label.items())] if other.head else []
        found = self.new_config(
            other.shape(config),
            patch_size=config.patch_size,
            image_size=config.image_size,
            labels=labels,
            qkv_bias=config.qkv_bias,
            layer_norm_eps=config.layer_norm_eps,
            hidden_act=config.hidden_act,
        )
        theirs, ours = other._facts(config), self._facts(found)
        odd = [f"{k}: {theirs[k]} instead of {ours[k]}" for k in ours if theirs[k] != ours[k]]
        if odd:
            raise ParentError(
                f"a {other.name} model that no {self.name} model can be",
                where=where or None,
                got="; ".join(odd),
                hint=f"fuse it with others of its kind, with family: {other.name}",
            )
        return found

    def adopt(
        self, model: nn.Module, other: Adopting, *, attention: str = "sdpa", where: str = ""
    ) -> nn.Module:
        """Return a model of the own class with the weights of a sibling's: the same function.

        Raises ParentError for what the own class can't express.
        """
        source: Any = model.config
        config = self.adopted_config(source, other, where)
        adopted = self.build(config, attention=attention)
        theirs, ours = other.layout(source), self.layout(config)
        state = {name: value.detach() for name, value in model.state_dict().items()}
        moved: dict[str, Tensor] = {}
        for old, new in _pairs(theirs, ours):
            moved |= {
                f"{new}{kind}": state[f"{old}{kind}"]
                for kind in ("", ".weight", ".bias")
                if f"{old}{kind}" in state
            }
        # what else the class has changes nothing: scales of 1, and what nothing reads
        kept = {name: value for name, value in adopted.state_dict().items() if name not in moved}
        with torch.no_grad():
            for name, value in kept.items():
                if name in self.optional:
                    value.zero_()
        adopted.load_state_dict(kept | moved)
        like = next(iter(moved.values()))
        return adopted.to(like.device, like.dtype)

    @property
    def head(self) -> str:
        """The path of the last layer, "" where there is none."""
        return str(getattr(self.ending, "head", ""))

    def _facts(self, config: Any) -> Facts:
        """Return what decides the function beside sizes and weights."""
        layout = self.layout(config)
        keys = ("image_size", "patch_size", "num_channels", "hidden_act", "qkv_bias")
        return {key: getattr(config, key) for key in keys} | {
            "layer_norm_eps": max(config.layer_norm_eps, USUAL_EPS),
            "tokens before the patches": ", ".join(self.before_patches(config)) or "none",
            "positions": self.atlas(config).spaces["positions"].size,
            "units of a head": self.head_dims(config),
            "what the head reads": layout.readout,
            "norm behind the pooling": layout.pool_first,
        }

    def _sibling(self, folder: Path) -> Adopting | None:
        """Return the sibling whose model the folder holds, if it is one's."""
        kind = saved_kind(folder)
        return None if kind == self.name else self.siblings.get(kind)


def acquaint(families: Iterable[object]) -> None:
    """Let all families of one task that can adopt know each other."""
    known = {family.name: family for family in families if isinstance(family, Adopting)}
    for name, family in known.items():
        family.siblings = {other: known[other] for other in known if other != name}


def saved_kind(folder: Path) -> str:
    """Return the model type that a folder's config.json tells, "" where it can't be known."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(raw, dict):
        return ""
    kind = str(raw.get("model_type", ""))
    return TIMM if "architecture" in raw and kind in ("", "timm_wrapper") else kind


def _pairs(a: Layout, b: Layout) -> Iterator[tuple[str, str]]:
    """Yield the paths of the same parameter or layer in two layouts of one function."""
    yield from zip(a.embed_parameters, b.embed_parameters, strict=False)  # a mask token is last
    for one, other in zip(a.blocks, b.blocks, strict=True):
        yield from ((getattr(one, part), getattr(other, part)) for part in PARTS)
    yield a.final_norm, b.final_norm
    if a.head:
        yield a.head, b.head
