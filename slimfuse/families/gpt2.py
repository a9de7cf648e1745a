"""Hugging Face GPT-2 (Radford et al. 2019): pre-norm decoder with LayerNorm and learned positions.

The class keeps queries, keys and values in one matrix, and every matrix as its transpose. Models
here are working forms (see `working`): `save` writes the stock form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from slimfuse.errors import ParentError
from slimfuse.families.base import Block, Layout, Shape
from slimfuse.families.decoder import shared_copy
from slimfuse.families.encoder import block_legs, norm_legs
from slimfuse.families.hf import StockFamily, starting_deviation
from slimfuse.families.working import SplitLinear, conv1d_of, linear_of, split_linear
from slimfuse.spaces import Atlas, Space

TABLE = "transformer.wte.weight"
POSITIONS = "transformer.wpe.weight"
MATRICES = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class GPT2(StockFamily):
    """`GPT2LMHeadModel` with any width, heads, MLP width and depth, tied or untied.

    Inputs are token ids (batch, tokens), padded on the right if at all: positions count from the
    first token.
    """

    name = "gpt2"
    stock = "GPT2LMHeadModel"
    mlp_key = "n_inner"
    alike = (
        "vocab_size", "n_positions", "activation_function", "layer_norm_epsilon",
        "scale_attn_weights",
    )  # fmt: skip

    def shape(self, config: Any) -> Shape:
        """Return the sizes that may shrink; the MLP is 4 times as wide where nothing is said."""
        mlp = config.n_inner or 4 * config.n_embd
        return Shape(config.n_embd, config.n_head, mlp, config.n_layer)

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Return a shape by the config's keys."""
        return {
            "n_embd": shape.hidden_size,
            "n_head": shape.num_attention_heads,
            "n_inner": shape.intermediate_size,
            "n_layer": shape.num_hidden_layers,
        }

    def atlas(self, config: Any) -> Atlas:
        """Return the legs of every parameter; a tied head is the embedding."""
        legs = {TABLE: "=vocab ^resid", POSITIONS: "=positions ^resid"}
        legs |= norm_legs("transformer.ln_f")
        if not config.tie_word_embeddings:
            legs["lm_head.weight"] = "=vocab _resid"
        spaces = [
            Space("vocab", config.vocab_size, "fixed"),
            Space("positions", config.n_positions, "fixed"),
            Space("resid", config.n_embd, "stream"),
        ]
        for block in self.blocks(config):
            legs |= block_legs(block)
            spaces += [
                Space(block.head_space, config.n_head, "head"),
                Space(block.qk_space, self.head_dims(config), "qk"),
                Space(block.vo_space, self.head_dims(config), "vo"),
                Space(block.mlp_space, self.shape(config).intermediate_size, "mlp"),
            ]
        return Atlas.declare(legs, spaces)

    def blocks(self, config: Any) -> tuple[Block, ...]:
        """Return all blocks."""
        return tuple(self.block(i) for i in range(config.n_layer))

    def block(self, i: int) -> Block:
        """Return where block i keeps its parts."""
        path = f"transformer.h.{i}"
        return Block(
            path=path,
            attention=f"{path}.attn",
            attention_norm=f"{path}.ln_1",
            q=f"{path}.attn.c_attn.q",
            k=f"{path}.attn.c_attn.k",
            v=f"{path}.attn.c_attn.v",
            o=f"{path}.attn.c_proj",
            mlp=f"{path}.mlp",
            mlp_norm=f"{path}.ln_2",
            up=f"{path}.mlp.c_fc",
            down=f"{path}.mlp.c_proj",
            head_space=f"head.{i}",
            qk_space=f"qk.{i}",
            vo_space=f"vo.{i}",
            mlp_space=f"mlp.{i}",
        )

    def layout(self, config: Any) -> Layout:
        """Return where the parts are."""
        return Layout(
            stream_space="resid",
            embed_parameters=(TABLE, POSITIONS),
            blocks=self.blocks(config),
            final_norm="transformer.ln_f",
            head="lm_head",
            readout="all",
            tied=bool(config.tie_word_embeddings),
        )

    def new_config(
        self, shape: Shape, *, vocab_size: int, positions: int, tied: bool = True, **keys: Any
    ) -> Any:
        """Return a config for training from scratch.

        vocab_size: tokens; positions: the longest sequence; tied: whether the head's weight is the
        embedding; keys: further ones of the class' config.
        """
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.name,
            initializer_range=starting_deviation(shape.hidden_size),
            vocab_size=vocab_size,
            n_positions=positions,
            tie_word_embeddings=tied,
            **self.sizes(shape),
            **keys,
        )

    def query_scale(self, parent: Any, target: Any) -> float:
        """Return √(d_target / d_parent), 1 where the class doesn't divide by √head_dim."""
        return super().query_scale(parent, target) if parent.scale_attn_weights else 1.0

    def check(self, config: Any, where: str) -> None:
        """Raise ParentError for cross attention and for scores that depend on the block."""
        keys = ("add_cross_attention", "scale_attn_by_inverse_layer_idx")
        found = [key for key in keys if getattr(config, key, False)]
        if found:
            raise ParentError(
                "attention of this kind isn't known",
                where=where,
                got=", ".join(f"{key} true" for key in found),
                allowed="false",
            )

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model in its working form, in evaluation mode."""
        return _working(super().build(config, attention=attention))

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model in its working form, strictly; raises ParentError."""
        return _working(super().load(folder, attention=attention, revision=revision))

    def stock_form(self, model: nn.Module) -> nn.Module:
        """Return the stock model with the weights of a working form."""
        stock = shared_copy(model)
        for block in _blocks(stock):
            for path in ("attn.c_attn", *MATRICES):
                linear = block.get_submodule(path)
                assert isinstance(linear, nn.Linear | SplitLinear)
                block.set_submodule(path, conv1d_of(linear))
        return stock

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the stock form: config.json and model.safetensors."""
        super().save(self.stock_form(model), folder)

    def flops(self, config: Any, tokens: int | None = None) -> int:
        """Return 2 x the multiply-adds of one sequence: matrices and attention products.

        tokens: its length; None for the longest the model takes.
        """
        tokens, d = tokens or config.n_positions, config.n_embd
        block = 4 * d * d + 2 * d * self.shape(config).intermediate_size + 2 * tokens * d
        return int(2 * tokens * (block * config.n_layer + d * config.vocab_size))


def _blocks(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("transformer.h").children())


def _working(model: nn.Module) -> nn.Module:
    """Put linear layers in the place of the class' own, in the model itself."""
    for block in _blocks(model):
        fused = linear_of(block.get_submodule("attn.c_attn"))
        split = split_linear(fused.weight, fused.bias, ("q", "k", "v"))
        block.set_submodule("attn.c_attn", split)
        for path in MATRICES:
            block.set_submodule(path, linear_of(block.get_submodule(path)))
    return model
