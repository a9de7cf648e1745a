"""timm's ViT (Wightman 2019, timm.models.vision_transformer): pre-norm, many small choices.

Class token or none, register tokens (Darcet et al. 2023, arXiv 2309.16588), class or average
pooling, the last norm before or behind it. The working form has queries, keys and values apart
and each LayerScale λ (Touvron et al. 2021, arXiv 2103.17239) in what writes to the stream, since
λ (W h + b) = (diag(λ) W) h + λ b; it is saved without LayerScale.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimfuse.errors import ParentError, first_line
from slimfuse.families.adopting import TIMM, Adopting, saved_kind
from slimfuse.families.base import Layout, Shape
from slimfuse.families.encoder import norm_legs
from slimfuse.families.endings import Classifier, Ending, NoHead
from slimfuse.families.hf import starting_deviation
from slimfuse.families.timm_model import TimmConfig, stock, working
from slimfuse.families.timm_stock import create, described, stock_class
from slimfuse.spaces import Space

BODY = "timm"
NAMES = {
    "cls_token": "cls_token",
    "position_embeddings": "pos_embed",
    "patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "patch_embeddings.projection.bias": "patch_embed.proj.bias",
}


class TimmViT(Adopting):
    """`timm.models.vision_transformer.VisionTransformer` with any width, depth, heads and MLP.

    Other blocks, gated MLPs, normed queries and keys, a norm before the blocks and pooling by
    attention are refused.
    """

    name = TIMM
    stem = "blocks.{i}"
    parts: ClassVar = {
        "attention": "attn",
        "attention_norm": "norm1",
        "q": "attn.qkv.q",
        "k": "attn.qkv.k",
        "v": "attn.qkv.v",
        "o": "attn.proj",
        "mlp": "mlp",
        "mlp_norm": "norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    }
    endings: ClassVar[Mapping[str, Ending]] = {
        "image-classification": Classifier("VisionTransformer", BODY, head=f"{BODY}.head"),
        "feature-extraction": NoHead("VisionTransformer", BODY, 0),
    }
    alike = (
        *Adopting.alike, "class_token", "reg_tokens", "no_embed_class", "global_pool", "fc_norm",
    )  # fmt: skip

    def embeddings(self, name: str) -> str:
        """Return the path of a part of the embeddings, named as transformers does."""
        return self.path(NAMES[name])

    def before_patches(self, config: Any) -> tuple[str, ...]:
        """Return the names of the tokens before the patches."""
        own = ("cls_token",) if config.class_token else ()
        return own + tuple(f"reg_token {i}" for i in range(config.reg_tokens))

    def tokens(self, config: Any) -> int:
        """Return how many tokens an image becomes."""
        return self.patches(config) + len(self.before_patches(config))

    def tables(self, config: Any) -> dict[str, str]:
        """Return the legs of the tokens, the positions and the patches' projection."""
        legs = super().tables(config)
        if not config.class_token:
            del legs[self.embeddings("cls_token")]
        if config.reg_tokens:
            legs[self.path("reg_token")] = "=one =registers ^resid"
        return legs

    def spaces(self, config: Any) -> list[Space]:
        """Return the spaces of the patches, the tokens, the stream and the head."""
        positions = self.patches(config) if config.no_embed_class else self.tokens(config)
        found = [s for s in super().spaces(config) if s.name != "positions"]
        found.append(Space("positions", positions, "fixed"))
        if config.reg_tokens:
            found.append(Space("registers", config.reg_tokens, "fixed"))
        return found

    def ends(self, config: Any) -> dict[str, str]:
        """Return the legs of the last norm and the head."""
        return norm_legs(self._last_norm(config)) | self.ending.legs(config)

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        found = replace(super().layout(config), final_norm=self._last_norm(config))
        if config.global_pool == "avg":
            prefix = len(self.before_patches(config))
            found = replace(found, readout="mean", prefix=prefix, pool_first=config.fc_norm)
        return found

    def new_config(
        self,
        shape: Shape,
        *,
        patch_size: int,
        image_size: int,
        labels: Sequence[str] = (),
        qkv_bias: bool = True,
        **keys: Any,
    ) -> Any:
        """Return a config for training from scratch, RGB input.

        keys: choices of `TimmConfig` by name. ε and activation are the class' own.
        """
        own = {k: v for k, v in keys.items() if k not in ("layer_norm_eps", "hidden_act")}
        return TimmConfig(
            shape.hidden_size,
            shape.num_attention_heads,
            shape.intermediate_size,
            shape.num_hidden_layers,
            image_size,
            patch_size,
            qkv_bias=qkv_bias,
            initializer_range=starting_deviation(shape.hidden_size),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            **own,
        )

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model in working form, in evaluation mode."""
        config = copy.deepcopy(config)
        classes = config.num_labels if self.head else 0
        model: Any = create(config.architecture, num_classes=classes, **config.arguments())
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=config.initializer_range)
        _attend(model, attention)
        return working(model, config)

    def read_own_config(self, folder: str, revision: str | None = None) -> Any:
        """Return what a saved timm model is; raises ParentError."""
        with torch.device("meta"):
            return self._described(self._stock(Path(folder)), Path(folder))

    def read_own(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved timm model in working form; raises ParentError.

        Only model.safetensors is read. A head that isn't wanted is left out.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        home = Path(folder)
        model: Any = self._stock(home)
        config = self._described(model, home)
        try:
            state = load_file(home / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ParentError(
                "the parent's weights can't be read",
                where=str(home),
                got=first_line(error),
                hint="save it with timm.models.save_for_hf(…, safe_serialization=True)",
            ) from error
        if not self.head:
            model.reset_classifier(0)
            state = {k: v for k, v in state.items() if not k.startswith("head.")}
        _fill(model, state, home)
        _attend(model.eval(), attention)
        return working(model, config)

    def stock_form(self, model: nn.Module) -> nn.Module:
        """Return a copy that is timm's own class within."""
        return stock(model)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write timm's config.json and model.safetensors; `local-dir:FOLDER` opens it in timm."""
        from timm.models import save_for_hf

        config: Any = model.config
        own: Any = stock(model).timm
        side = config.image_size
        sides = (side, side) if isinstance(side, int) else side
        own.pretrained_cfg = config.pretrained_cfg | {
            "architecture": config.architecture,
            "num_classes": own.num_classes,
            "input_size": [config.num_channels, *sides],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        names = {"label_names": list(config.id2label.values())} if self.head else {}
        save_for_hf(
            own, str(folder), model_config=names, model_args=config.arguments(),
            safe_serialization=True,
        )  # fmt: skip
        file = folder / "config.json"
        told = json.loads(file.read_text(encoding="utf-8"))
        told["model_args"].pop("num_classes", None)  # transformers' wrapper gives it a second time
        file.write_text(json.dumps(told, indent=2, sort_keys=True), encoding="utf-8")

    def _last_norm(self, config: Any) -> str:
        return self.path("fc_norm" if config.fc_norm else "norm")

    def _stock(self, folder: Path) -> nn.Module:
        """Return timm's model as the folder's config.json tells it, without its weights."""
        if saved_kind(folder) != TIMM:
            raise ParentError(
                "the folder holds no timm model",
                where=str(folder),
                got=saved_kind(folder) or "no config.json with an architecture",
                hint="save it with timm.models.save_for_hf(…, safe_serialization=True)",
            )
        return create(f"local-dir:{folder}", where=str(folder))

    def _described(self, model: nn.Module, folder: Path) -> TimmConfig:
        """Return the config of timm's model; raises ParentError for what the family can't take."""
        found = TimmConfig(**described(model, str(folder)))
        if self.head and not found.num_labels:
            raise ParentError("the parent has no head", where=str(folder), got="num_classes 0")
        if not self.head:
            found.id2label, found.label2id = {}, {}
            if found.fc_norm:
                raise ParentError(
                    "features of a model that norms behind its pooling aren't known",
                    where=str(folder),
                    got="fc_norm True",
                    allowed="fc_norm False",
                )
        return found


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Load weights strictly; raises ParentError, naming what is missing, left over or odd."""
    own = model.state_dict()
    wrong = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            k for k in own if k in state and own[k].shape != state[k].shape
        ],
    }  # fmt: skip
    if any(wrong.values()):
        raise ParentError(
            "the parent's weights don't fit its config",
            where=str(folder),
            got="; ".join(f"{what}: {names[:5]}" for what, names in wrong.items() if names),
            hint=f"save it as {stock_class().__name__} with timm.models.save_for_hf",
        )
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise ParentError(
            "the parent's weights hold nan or inf", where=str(folder), got=", ".join(broken[:5])
        )
    model.load_state_dict({name: value.float() for name, value in state.items()})


def _attend(model: Any, kind: str) -> None:
    for block in model.blocks:
        block.attn.fused_attn = kind != "eager"
