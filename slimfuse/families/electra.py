"""Hugging Face ELECTRA (Clark et al. 2020, arXiv 2003.10555): post-norm, embeddings may be narrow.

Where embedding_size differs from hidden_size, the embeddings have a space of their own: tables and
their norm live there, and a linear layer writes the first stream, which no norm has left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch.nn.functional import gelu

from slimfuse.errors import ShapeError
from slimfuse.families.base import Layout, Pooler, Shape
from slimfuse.families.encoder import TextEncoder, norm_legs
from slimfuse.families.endings import WordHead, text_endings
from slimfuse.families.hf import differences
from slimfuse.spaces import Space

PROJECTION = "embeddings_project"


class Electra(TextEncoder):
    """ELECTRA with any width, depth, heads and MLP width."""

    name = "electra"
    endings: ClassVar = text_endings(
        "Electra",
        "electra",
        ("classifier.out_proj", Pooler("classifier.dense", "pool", gelu)),
        WordHead(
            "ElectraForMaskedLM",
            "electra",
            dense="generator_predictions.dense",
            norm="generator_predictions.LayerNorm",
            head="generator_lm_head",
            bias="generator_lm_head.bias",
        ),
        pooler=False,
    )
    heads = (
        *TextEncoder.heads, "discriminator_predictions.", "generator_predictions.",
        "generator_lm_head.", "sequence_summary.",
    )  # fmt: skip

    def tables(self, config: Any) -> dict[str, str]:
        """Return the legs of the tables, which write the first stream or what it is made of."""
        found = super().tables(config)
        if not _projected(config):
            return found
        return {name: legs.replace("^resid", "^embed") for name, legs in found.items()}

    def ends(self, config: Any) -> dict[str, str]:
        """Return the legs of the first norm, the projection behind it, and the ending."""
        found, path = super().ends(config), self.path(PROJECTION)
        if not _projected(config):
            return found
        own = {f"{path}.weight": "^resid _embed", f"{path}.bias": "^resid"}
        return found | own | norm_legs(self.embeddings("LayerNorm"), "embed")

    def spaces(self, config: Any) -> list[Space]:
        """Return the spaces of the tables, the stream and the ending."""
        found = super().spaces(config)
        own = [Space("embed", config.embedding_size, "stream")]
        return found + own if _projected(config) else found

    def layout(self, config: Any) -> Layout:
        """Return where the parts are; narrow embeddings stay as they are."""
        found = super().layout(config)
        if not _projected(config):
            return found
        own = (*self.tables(config), *norm_legs(self.embeddings("LayerNorm")))
        return replace(
            found, embed_parameters=(), embed_norm="", projection=self.path(PROJECTION), kept=own,
            tied=False,
        )  # fmt: skip

    def new_config(self, *args: Any, **inputs: Any) -> Any:
        """Return a config for training from scratch, its embeddings as wide as the stream."""
        config = super().new_config(*args, **inputs)
        if "embedding_size" not in inputs:
            config.embedding_size = config.hidden_size
        return config

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`; ShapeError names the nearest legal width."""
        narrowed = super().narrow(config, shape)
        if not _projected(config):
            narrowed.embedding_size = shape.hidden_size
        elif not _projected(narrowed):
            raise ShapeError(
                "the class has no projection where the embeddings are as wide as the stream",
                where="target.hidden_size",
                got=shape.hidden_size,
                allowed=f"any other width than embedding_size {config.embedding_size}",
            )
        return narrowed

    def flops(self, config: Any, tokens: int | None = None) -> int:
        """Return 2 x the multiply-adds of one text, see `TextEncoder`."""
        used = tokens or config.max_position_embeddings
        projection = used * config.embedding_size * config.hidden_size if _projected(config) else 0
        return super().flops(config, tokens) + 2 * int(projection)

    def mismatches(self, configs: dict[str, Any]) -> list[str]:
        """Compare the configs; embeddings as wide as the stream may differ with it."""
        found = super().mismatches(configs)
        if any(_projected(config) for config in configs.values()):
            found += differences(configs, ("embedding_size",))
        return found


def _projected(config: Any) -> bool:
    return bool(config.embedding_size != config.hidden_size)
