"""What families of Hugging Face classes share: building, reading, narrowing and comparing."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slimfuse.errors import ParentError, ShapeError, first_line
from slimfuse.families.base import Shape


def starting_deviation(width: int) -> float:
    """Return √(2 / 5·width): the initial deviation that suits narrow models, too.

    Source: Nguyen & Salazar 2019 (arXiv 1910.05895).
    """
    return round(math.sqrt(2 / (5 * width)), 4)


class StockFamily:
    """A family of one transformers class: what of `Family` its name and its config's keys give.

    name: transformers' model type; stock: the class; mlp_key: the config's key of the MLP's width;
    alike: the keys in which models have to agree to be fused; heads: what the names of other
    classes' heads begin with, which a saved model may hold beside what is wanted; optional:
    parameters that it may lack, which are nought then.
    """

    name: str
    stock: str
    alike: tuple[str, ...]
    mlp_key: str = "intermediate_size"
    heads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def shape(self, config: Any) -> Shape:
        """Return the sizes that may shrink."""
        return Shape(
            config.hidden_size,
            config.num_attention_heads,
            getattr(config, self.mlp_key),
            config.num_hidden_layers,
        )

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Return a shape by the config's keys; raises ShapeError where they can't say it."""
        return {
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            self.mlp_key: shape.intermediate_size,
            "num_hidden_layers": shape.num_hidden_layers,
        }

    def head_dims(self, config: Any) -> int:
        """Return hidden_size / num_attention_heads: the class knows no other."""
        return int(config.hidden_size // config.num_attention_heads)

    def query_scale(self, parent: Any, target: Any) -> float:
        """Return √(d_target / d_parent): undoes the class' own division by √head_dim."""
        return float((self.head_dims(target) / self.head_dims(parent)) ** 0.5)

    def fresh_config(self, shape: Shape, labels: Sequence[str], **keys: Any) -> Any:
        """Return the config of a model that is to be trained; keys: of the class' config.

        Weights start with variance 2/(5·width) (Nguyen & Salazar 2019, arXiv 1910.05895): the
        classes' own 0.02 suits width 768 and learns slowly in narrow models. labels: of a
        classifier, none of other classes.
        """
        from transformers import AutoConfig

        if labels:
            keys["id2label"] = dict(enumerate(labels))
            keys["label2id"] = {label: i for i, label in enumerate(labels)}
        return AutoConfig.for_model(
            self.name,
            initializer_range=starting_deviation(shape.hidden_size),
            **self.sizes(shape),
            **keys,
        )

    def narrow(self, config: Any, shape: Shape) -> Any:
        """Return a copy of `config` with `shape`; ShapeError names the nearest legal width."""
        check_shape(shape, self.shape(config))
        narrowed = copy.deepcopy(config)
        narrowed.initializer_range = starting_deviation(shape.hidden_size)  # for a random start
        for key, size in self.sizes(shape).items():
            setattr(narrowed, key, size)
        return narrowed

    def build(self, config: Any, *, attention: str = "sdpa") -> nn.Module:
        """Return a randomly initialised model in evaluation mode."""
        config = copy.deepcopy(config)
        config._attn_implementation = self._attention(attention)
        model: nn.Module = self._class()(config).eval()
        return model

    def check(self, config: Any, where: str) -> None:
        """Raise ParentError for a config of this type that the family can't take."""

    def load_config(self, folder: str, revision: str | None = None) -> Any:
        """Return the config of a saved model; raises ParentError."""
        config = read_config(folder, self.name, revision)
        self.check(config, str(folder))
        return config

    def load(
        self, folder: str | Path, *, attention: str = "sdpa", revision: str | None = None
    ) -> nn.Module:
        """Return a saved model in evaluation mode; a missing or unexpected weight is an error.

        A model saved with another head than the wanted one will do where the wanted one has none.
        """
        self.load_config(str(folder), revision)
        return read_model(
            self._class(), folder, attention=self._attention(attention), revision=revision,
            heads=self.heads, optional=self.optional,
        )  # fmt: skip

    def stock_form(self, model: nn.Module) -> nn.Module:
        """Return the model itself: it is one of a stock class."""
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        model.save_pretrained(folder)  # type: ignore[operator]

    def mismatches(self, configs: dict[str, Any]) -> list[str]:
        """Return what keeps models with these configs from being fused, one line each."""
        return differences(configs, self.alike)

    def _class(self) -> Any:
        import transformers

        return getattr(transformers, self.stock)

    def _attention(self, wanted: str) -> str:
        """Return the wanted kind of attention, eager where the class knows no other."""
        return wanted if self._class()._supports_sdpa else "eager"


def check_shape(shape: Shape, limits: Shape) -> None:
    """Raise ShapeError, naming the nearest legal width, for a shape that a target can't have.

    limits: the parents' sizes, which no size may pass; hidden_size must be a multiple of
    num_attention_heads with at least two units a head.
    """
    for key in Shape.__dataclass_fields__:
        if getattr(shape, key) > getattr(limits, key):
            raise ShapeError(
                f"{key} of the target is larger than the parents'",
                where=f"target.{key}",
                got=getattr(shape, key),
                allowed=f"1 … {getattr(limits, key)}",
            )
    width, heads = shape.hidden_size, shape.num_attention_heads
    legal = range(2 * heads, limits.hidden_size + 1, heads)
    if not legal:
        raise ShapeError(
            "a head needs at least two units",
            where="target.num_attention_heads",
            got=f"{heads} heads, hidden_size up to {limits.hidden_size}",
            allowed=f"num_attention_heads up to {limits.hidden_size // 2}",
        )
    if width not in legal:
        near = sorted(sorted(legal, key=lambda w: abs(w - width))[:2])
        raise ShapeError(
            "hidden_size must be a multiple of num_attention_heads, with at least two units a head",
            where="target.hidden_size",
            got=f"hidden_size {width}, num_attention_heads {heads}",
            allowed=f"hidden_size {' or '.join(map(str, near))}",
        )


MOST = {
    "hidden_size": 2**20, "intermediate_size": 2**22, "num_attention_heads": 2**16,
    "num_hidden_layers": 10_000, "vocab_size": 2**24, "image_size": 2**16, "patch_size": 2**16,
    "num_channels": 2**16, "max_position_embeddings": 2**30,
}  # fmt: skip
"""The largest sizes that a config may have, far above any model's."""


def read_config(folder: str, model_type: str, revision: str | None = None) -> Any:
    """Return the config of a saved model of this type; raises ParentError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except Exception as error:  # of any kind, where config.json is no config
        raise ParentError(
            "the parent can't be opened",
            where=str(folder),
            got=first_line(error),
            hint="give a folder with config.json and model.safetensors, or a hub id if online",
        ) from error
    if config.model_type != model_type:
        raise ParentError(
            "the parent is of another family",
            where=str(folder),
            got=config.model_type,
            allowed=model_type,
        )
    sizes = {key: getattr(config, key, None) for key in MOST}
    odd = [k for k, n in sizes.items() if isinstance(n, int) and not 1 <= n <= MOST[k]]
    if odd:  # before a model of such sizes is built
        raise ParentError(
            "the parent's config has sizes that no model has",
            where=str(folder),
            got=", ".join(f"{key} {sizes[key]}" for key in odd),
            allowed=", ".join(f"{key} 1 to {MOST[key]}" for key in odd),
        )
    return config


def read_model(
    stock: Any,
    folder: str | Path,
    *,
    attention: str,
    revision: str | None = None,
    heads: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> nn.Module:
    """Return a saved model of a stock class in evaluation mode, strictly; raises ParentError.

    Weights are memory-mapped. A missing, unexpected or misshapen weight is an error, but for those
    of other classes' heads (what their names begin with) and for optional ones, see `StockFamily`.
    """
    import torch
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would say of weights is told below
    try:
        model, info = stock.from_pretrained(
            folder,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, by name
            attn_implementation=attention,
            dtype=torch.float32,
        )
    except Exception as error:  # of any kind, where config and weights are a stranger's
        raise ParentError(
            "the parent's weights can't be read",
            where=str(folder),
            got=first_line(error),
            hint="the file may be cut off or not safetensors: fetch or save it again",
        ) from error
    finally:
        logging.set_verbosity(level)
    lacks = set(info["missing_keys"]) & set(optional)
    info["missing_keys"] = set(info["missing_keys"]) - lacks
    others = (*heads, *(f"{stock.base_model_prefix}.{head}" for head in heads))
    info["unexpected_keys"] = {k for k in info["unexpected_keys"] if not k.startswith(others)}
    with torch.no_grad():
        for name in lacks:
            model.get_parameter(name).zero_()
    wrong = {k: [_short(name) for name in sorted(v)[:5]] for k, v in info.items() if v}
    if wrong:
        raise ParentError(
            "the parent's weights don't fit its config",
            where=str(folder),
            got="; ".join(f"{k}: {v}" for k, v in wrong.items()),
            hint=f"fine-tune and save it as {stock.__name__} first",
        )
    broken = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise ParentError(
            "the parent's weights hold nan or inf",
            where=str(folder),
            got=", ".join(broken[:5]),
            hint="take an earlier checkpoint of its training",
        )
    loaded: nn.Module = model.eval()
    return loaded


def differences(configs: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Return a line for every key in which a config differs from the first."""
    (first, base), *others = configs.items()
    return [
        f"{key}: {first} has {getattr(base, key)}, {name} has {getattr(config, key)}"
        for name, config in others
        for key in keys
        if getattr(base, key) != getattr(config, key)
    ]


def _short(told: Any) -> Any:
    """Return what transformers tells of a weight, its name cut to a line's length."""
    return told[:100] if isinstance(told, str) else told
