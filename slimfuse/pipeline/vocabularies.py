"""Tokenizers of several parents: equal, equal but for the tokens' numbers, or not to be fused."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.errors import ParentError
from slimfuse.families import Family
from slimfuse.tasks.texts import SIDES, TextTask, backend, special_tokens

Order = Mapping[int, int]
"""Where another model keeps a token, by its number in the first tokenizer."""

LISTED = 5  # tokens in an error
SPACE = "vocab"
NUMBERED = "_token_id"  # how a config's keys end that hold tokens' numbers


def common_tokenizer(task: TextTask, folders: Mapping[str, Path]) -> tuple[Any, dict[str, Order]]:
    """Return the first model's tokenizer, and the order of each one with other numbers.

    It takes texts as long as every model does. Raises ParentError where they cut texts otherwise.
    """
    found = {name: task.load(folder) for name, folder in folders.items()}
    (first, base), *others = found.items()
    orders = {}
    for name, tokenizer in others:
        order = compare(first, base, name, tokenizer)
        if order is not None:
            orders[name] = order
    base.model_max_length = min(t.model_max_length for t in found.values())
    return base, orders


def compare(first: str, base: Any, name: str, other: Any) -> Order | None:
    """Return where `other` keeps the tokens of `base`, None where all numbers are the same.

    Raises ParentError where they differ in anything but the numbers. A special token that only one
    of them names is no difference.
    """
    differing = _differences(first, base, name, other)
    if differing:
        raise ParentError(
            "the parents cut texts into other tokens",
            where="tokenizer.json",
            got="; ".join(differing),
            hint="fuse models with one tokenizer",
        )
    settings = _settings(first, base, name, other)
    if settings:
        raise ParentError(
            "the parents' tokenizers are set up differently",
            where="tokenizer_config.json",
            got="; ".join(settings),
            hint="fuse models with one tokenizer, or save them with the same settings",
        )
    ours, theirs = base.get_vocab(), other.get_vocab()
    return None if ours == theirs else {i: theirs[token] for token, i in ours.items()}


def _differences(first: str, base: Any, name: str, other: Any) -> list[str]:
    """Return what keeps two tokenizers apart, their tokens' numbers left out, one line each."""
    one, two = base.get_vocab(), other.get_vocab()
    odd = sorted(one.keys() ^ two.keys())
    if odd:
        shown = ", ".join(map(repr, odd[:LISTED]))
        return [
            f"vocabulary: {first} has {len(one)} tokens, {name} {len(two)}, "
            f"{len(odd)} are of one of them only, such as {shown}"
        ]
    left, right = _spelled(base), _spelled(other)
    keys = [k for k in left.keys() | right.keys() if left.get(k) != right.get(k)]
    return [f"{key} of {first} and {name}" for key in sorted(keys)]


def _settings(first: str, base: Any, name: str, other: Any) -> list[str]:
    """Return what two tokenizers of the same rules do otherwise, one line each."""
    left, right = special_tokens(base), special_tokens(other)
    shared = [key for key in left if key in right]
    pairs = {key: (left[key], right[key]) for key in shared}
    pairs |= {side: (getattr(base, side), getattr(other, side)) for side in SIDES}
    return [f"{k}: {first} has {a!r}, {name} {b!r}" for k, (a, b) in pairs.items() if a != b]


def _spelled(tokenizer: Any) -> dict[str, Any]:
    """Return all that a tokenizer does with a text, tokens by their names."""
    told: dict[str, Any] = json.loads(backend(tokenizer))
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    model = told.pop("model")
    if isinstance(model.get("vocab"), list):  # Unigram: tokens with scores, in their order
        model["vocab"] = sorted(map(list, model["vocab"]))
        model["unk_id"] = names.get(model.get("unk_id"))
    else:
        model["vocab"] = None  # the same tokens, as was seen before
    told |= {f"model.{key}": value for key, value in model.items()}
    added = [{k: v for k, v in token.items() if k != "id"} for token in told["added_tokens"]]
    told["added_tokens"] = sorted(added, key=lambda token: str(token["content"]))
    told["post_processor"] = _named(told["post_processor"], names)
    return told


def _named(part: Any, names: Mapping[int, str]) -> Any:
    """Return a post-processor with the names of its tokens in place of their numbers."""
    if isinstance(part, list):
        return [_named(item, names) for item in part]
    if not isinstance(part, dict):
        return part
    found = {}
    for key, value in part.items():
        if key == "ids":  # of a template: the tokens that a special one stands for
            found[key] = [names.get(i) for i in value]
        elif key in ("cls", "sep") and isinstance(value, list):  # of BERT and RoBERTa: name, number
            found[key] = [value[0], names.get(value[1])]
        else:
            found[key] = _named(value, names)
    return found


def aligned_config(family: Family, config: Any, order: Order, *, where: str | None = None) -> Any:
    """Return a copy of a config whose own tokens have the numbers of another tokenizer.

    order: where the model keeps each token of that tokenizer. Raises ParentError where tokens have
    no row, or where the positions count from a token (RoBERTa's padding) whose number changes.
    """
    turned = renumbered(config, places(order, int(config.vocab_size), where))
    if first_position(family, config) != first_position(family, turned):
        raise ParentError(
            "the positions count from the padding token, which has another number here",
            where=where,
            got=f"pad_token_id {config.pad_token_id}",
            allowed=f"pad_token_id {turned.pad_token_id}",
            hint="fuse models whose padding token has one number",
        )
    return turned


def align(family: Family, model: nn.Module, order: Order, *, where: str | None = None) -> nn.Module:
    """Return a copy of a model whose tokens have the numbers of another tokenizer.

    Every axis of the vocabulary is permuted, W'[i] = W[order[i]], and the config is
    `aligned_config`'s; rows that no token uses keep their order. Raises ParentError as that does.
    """
    config: Any = model.config
    turned = aligned_config(family, config, order, where=where)
    rows = places(order, int(config.vocab_size), where)
    atlas = family.atlas(config)
    aligned = family.build(turned).to(next(model.parameters()).dtype)
    own = dict(aligned.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            moved: Tensor = value
            for dim, axis in enumerate(atlas.axes[name]):
                if any(leg.space == SPACE for leg in axis):
                    assert len(axis) == 1, "the vocabulary is an axis of its own"
                    moved = moved.index_select(dim, rows.to(value.device))
            own[name].copy_(moved)
        buffers = dict(aligned.named_buffers())
        for name, buffer in model.named_buffers():
            buffers[name].copy_(buffer)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        aligned.generation_config = renumbered(generation, rows)
    return aligned


def first_position(family: Family, config: Any) -> int:
    """Return the place of a text's first token among the positions; 0 where a family says none."""
    found = getattr(family, "first_position", None)
    return 0 if found is None else int(found(config))


def places(order: Order, size: int, where: str | None = None) -> Tensor:
    """Return the row (size,) of every token of the other tokenizer; unused rows fill the rest."""
    most = max(max(order), max(order.values()))
    if most >= size:
        raise ParentError(
            "the tokenizer has tokens that the model has no row for",
            where=where,
            got=f"token {most}, {size} rows",
        )
    used = set(order.values())
    free = iter(i for i in range(size) if i not in used)
    return torch.tensor([order[i] if i in order else next(free) for i in range(size)])


def renumbered(config: Any, rows: Tensor) -> Any:
    """Return a copy of a config whose special tokens stand at their new places."""
    new = {int(old): i for i, old in enumerate(rows)}
    turned = copy.deepcopy(config)
    for key, value in vars(config).items():
        if not key.endswith(NUMBERED) or value is None or isinstance(value, Tensor):
            continue
        if isinstance(value, list | tuple):
            setattr(turned, key, [new.get(i, i) for i in value])
        else:
            setattr(turned, key, new.get(value, value))
    return turned
