"""Canonical form of a pre-norm LayerNorm transformer: the same function, fewer free choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from slimfuse.errors import ParentError, ShapeError
from slimfuse.families import Family, Layout
from slimfuse.fuse.stream import centring
from slimfuse.spaces import Atlas, LinearMap, Role, transform

State = dict[str, Tensor]


def norms(layout: Layout) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every norm with the layers that read it."""
    for block in layout.blocks:
        yield block.attention_norm, (block.q, block.k, block.v)
        yield block.mlp_norm, (block.up,)
    yield layout.final_norm, (layout.head,)


def canonical(model: nn.Module, family: Family) -> State:
    """Return the float64 parameters of `model` in canonical form; the function stays the same.

    - LayerNorm's gain γ and shift β go into its readers, W γ and b + W β: γ = 1, β = 0;
    - everything that writes the stream is projected by P = I - 11ᵀ/d, and so are its readers:
      LayerNorm doesn't see the mean over channels, and its own output has none;
    - the key's bias is 0, as it adds the same to a query's scores with every key; the value's
      bias goes into the output's, b_o + W_o b_v, as attention weights sum to 1.
    Readers without a bias (`qkv_bias: false`) carry one where nothing else is: their norm's shift
    is 1, and W + b 1ᵀ/d reads b from it (see `reader_bias`). Raises ParentError where the norms
    aren't LayerNorm with gain and shift, and where heads share keys. Source: fusion.md §8 (logits
    change by rounding only, 8e-15 measured).
    """
    layout, atlas = family.layout(model.config), family.atlas(model.config)
    check_symmetry(model, layout)
    if not layout.head:
        raise ParentError(
            "the stream of a model without a head can't be turned: it is what the model gives",
            where=layout.final_norm,
            got="no head",
            allowed="models with a head that reads the last norm",
            hint="use the refit instead, which needs no gauge",
        )
    found = dict(model.state_dict())
    state = {name: found[name].detach().cpu().double().clone() for name in atlas.axes}
    project = centring(atlas.spaces[layout.stream_space].size)
    stream = [name for name in state if layout.stream_space in _written(atlas, name)]
    gains = {f"{norm}.weight" for norm, _ in norms(layout)}
    shifts = {f"{norm}.bias" for norm, _ in norms(layout)}
    maps = {layout.stream_space: LinearMap(project, project)}
    for norm, readers in norms(layout):
        _fold_norm(state, norm, readers, project)
    for block in layout.blocks:
        set_reader_bias(state, block.k, None)
        if f"{block.o}.bias" in state:
            value = reader_bias(state, block.v)
            state[f"{block.o}.bias"] += state[f"{block.o}.weight"] @ value
            set_reader_bias(state, block.v, None)
    names = [name for name in stream if name not in gains | shifts]
    return state | transform(state, atlas, maps, only=names)


def reader_bias(state: Mapping[str, Tensor], reader: str) -> Tensor:
    """Return the bias of a layer that reads a norm, from canonical parameters.

    Without a parameter of its own it is W 1, what the layer makes of the norm's shift of ones.
    """
    bias = state.get(f"{reader}.bias")
    return state[f"{reader}.weight"].sum(1) if bias is None else bias


def set_reader_bias(state: State, reader: str, bias: Tensor | None) -> None:
    """Give a reader of canonical parameters this bias, None for nought (see `reader_bias`)."""
    if f"{reader}.bias" in state:
        kept = state[f"{reader}.bias"]
        state[f"{reader}.bias"] = torch.zeros_like(kept) if bias is None else bias
        return
    weight = state[f"{reader}.weight"]
    state[f"{reader}.weight"] = weight - weight.mean(1, keepdim=True)
    if bias is not None:
        state[f"{reader}.weight"] += bias[:, None] / weight.shape[1]


def check_symmetry(model: nn.Module, layout: Layout) -> None:
    """Raise ParentError unless the stream turns as a whole and every head has its own keys."""
    if layout.norm_order == "post":
        raise ParentError(
            "a post-norm stream can't be turned: its norms' gains hold the channels in place",
            where=layout.blocks[0].attention_norm,
            got="post-norm",
            allowed="pre-norm models with LayerNorm, gain and shift",
            hint="use the refit instead, which needs no gauge",
        )
    if layout.tied:
        raise ParentError(
            "the gauge of a head that is the embeddings' table isn't known",
            where=layout.head,
            got="tied",
            hint="use the refit instead, which needs no gauge",
        )
    for norm, _ in norms(layout):
        module = model.get_submodule(norm)
        if not isinstance(module, nn.LayerNorm) or module.weight is None or module.bias is None:
            raise ParentError(
                "the gauge of this class isn't known",
                where=norm,
                got=type(module).__name__,
                allowed="pre-norm models with LayerNorm, gain and shift",
                hint="use the refit instead, which needs no gauge",
            )
    for block in layout.blocks:
        q, k = (model.get_parameter(f"{name}.weight").shape for name in (block.q, block.k))
        if q != k:
            raise ParentError(
                "the gauge of heads that share keys isn't known",
                where=block.k,
                got=f"queries {tuple(q)}, keys {tuple(k)}",
                allowed="as many key as query heads",
                hint="use the refit instead, which needs no gauge",
            )


def write(target: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy parameters into `target`, in its own dtype; raises ShapeError where they don't fit."""
    with torch.no_grad():
        for name, value in target.named_parameters():
            if value.shape != state[name].shape:
                raise ShapeError(
                    "the target's shape isn't that of the weights",
                    where=name,
                    got=tuple(value.shape),
                    allowed=tuple(state[name].shape),
                )
            value.copy_(state[name])


def _fold_norm(state: State, norm: str, readers: tuple[str, ...], project: Tensor) -> None:
    gain, shift = state[f"{norm}.weight"], state[f"{norm}.bias"]
    biased = [f"{reader}.bias" in state for reader in readers]
    for reader, own in zip(readers, biased, strict=True):
        weight = state[f"{reader}.weight"]
        bias = weight @ shift + (state[f"{reader}.bias"] if own else 0.0)
        state[f"{reader}.weight"] = (weight * gain) @ project
        set_reader_bias(state, reader, bias)
    state[f"{norm}.weight"] = torch.ones_like(gain)
    state[f"{norm}.bias"] = torch.full_like(shift, 0.0 if all(biased) else 1.0)


def _written(atlas: Atlas, name: str) -> set[str]:
    return {leg.space for axis in atlas.axes[name] for leg in axis if leg.role is Role.WRITE}
