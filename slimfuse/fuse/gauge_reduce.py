"""A narrower model from one model's canonical form, in closed form and without a refit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimfuse.batch import Batches, Inputs
from slimfuse.errors import ShapeError
from slimfuse.families import Block, Family, Layout
from slimfuse.fuse.canonical import State, canonical, norms, reader_bias, set_reader_bias, write
from slimfuse.fuse.gauge_stats import direction, row_weights, steps
from slimfuse.fuse.greedy import greedy_groups
from slimfuse.fuse.solve import decoder, reduce_scores, reduce_values
from slimfuse.fuse.stream import centring
from slimfuse.moments import Moments
from slimfuse.spaces import LinearMap, transform


@dataclass(frozen=True)
class Reduction:
    """What became of a model. stream: M (m, d), target stream z = M x; M Mᵀ = I - 11ᵀ/m.

    energy: share of the normalised stream that M keeps; heads, units: per layer, the source's
    that the target keeps, in the target's order.
    """

    stream: Tensor
    energy: float
    heads: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Seen:
    stream: Moments
    q: tuple[Moments, ...]
    k: tuple[Moments, ...]
    context: tuple[Moments, ...]
    units: tuple[Moments, ...]


def reduce(
    model: nn.Module,
    target: nn.Module,
    family: Family,
    batches: Batches,
    *,
    importance: Tensor | None = None,
) -> Reduction:
    """Write a reduced copy of `model` into `target`, of the same class, depth and fewer units.

    From the canonical form: writers M W; readers W Mᵀ √(d/m), because the target's LayerNorm
    divides by the root mean square over m channels instead of d; M = B Vᵀ with V the top m - 1
    eigenvectors of the normalised stream's second moment, B a basis of the complement of 1.
    Heads and MLP units are those that explain what all of them write best (`greedy_groups`); the
    rest is added to the kept ones' outputs and bias by least squares, the OBS step in closed form
    (Hassibi & Stork 1993). Smaller heads: `reduce_scores`, `reduce_values`. importance: (depths,
    tokens), see `gauge_stats.meet`. Exact up to LayerNorm's ε where the stream lives in m - 1
    dimensions and the dropped units are linear in the kept ones. Source: fusion.md §8.
    """
    layout = family.layout(model.config)
    shape, depth = family.shape(target.config), len(layout.blocks)
    if shape.num_hidden_layers != depth:
        raise ShapeError(
            "a reduced model must be as deep as its source",
            where="target.num_hidden_layers",
            got=shape.num_hidden_layers,
            allowed=depth,
            hint="drop layers first, see fuse.depth",
        )
    state = canonical(model, family)
    with torch.no_grad():
        seen = _watch(model, layout, batches(), importance)
    second = seen.stream.second("x")
    encode = narrowing(second, shape.hidden_size)
    heads, units = [], []
    for layer, block in enumerate(layout.blocks):
        kept = _reduce_heads(
            state, block, (seen.q[layer], seen.k[layer], seen.context[layer]), encode,
            (family.head_dims(model.config), family.head_dims(target.config)),
            shape.num_attention_heads, family.query_scale(model.config, target.config),
        )  # fmt: skip
        heads.append(tuple(kept))
        units.append(
            tuple(_reduce_units(state, block, seen.units[layer], encode, shape.intermediate_size))
        )
    write(target, _narrow_stream(state, family, model, layout, encode))
    energy = float((encode @ second @ encode.T).trace() / second.trace())
    return Reduction(encode, energy, tuple(heads), tuple(units))


def narrowing(second: Tensor, width: int) -> Tensor:
    """Return M = B Vᵀ (width, d) for streams with second moment (d, d) off the all-ones vector.

    V: the top width - 1 eigenvectors; B: an orthonormal basis of the vectors of `width` entries
    that sum to 0 (columns of a Householder reflection), so that LayerNorm loses nothing. At
    width = d the map is square and loses nothing at all.
    """
    project = centring(len(second))
    ones = torch.full_like(second, float(second.trace()) / len(second))
    _, vectors = torch.linalg.eigh(project @ second @ project - ones)  # the all-ones comes last
    top = vectors[:, -(width - 1) :].flip(1)
    encode: Tensor = complement(width) @ top.T @ project
    return encode


def complement(size: int) -> Tensor:
    """Return an orthonormal basis (size, size - 1) of the vectors whose entries sum to 0."""
    axis = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    axis[0] += 1  # reflects the first unit vector onto -1/√size
    eye = torch.eye(size, dtype=torch.float64)
    reflection: Tensor = eye - 2 * axis @ axis.T / axis.square().sum()
    return reflection[:, 1:]


def _watch(
    model: nn.Module, layout: Layout, batches: Iterable[Inputs], importance: Tensor | None
) -> _Seen:
    seen: _Seen | None = None
    for batch in batches:
        for point, step in enumerate(steps(model, layout, batch)):
            weights = row_weights(importance, point, len(batch))
            if seen is None:
                seen = _empty(model, layout, step.stream.shape[1])
            seen.stream.update(weights, x=direction(step.stream))
            layer = (point - 1) // 2
            for name, rows in step.parts.items():
                moments: Moments = getattr(seen, name)[layer]
                moments.update(None if name == "k" else weights, x=rows)
    assert seen is not None, "no batch was given"
    return seen


def _empty(model: nn.Module, layout: Layout, width: int) -> _Seen:
    def each(part: str) -> tuple[Moments, ...]:
        names = [f"{getattr(block, part)}.weight" for block in layout.blocks]
        return tuple(Moments(x=len(model.get_parameter(name))) for name in names)

    return _Seen(Moments(x=width), each("q"), each("k"), each("v"), each("up"))


def _reduce_heads(
    state: State,
    block: Block,
    moments: tuple[Moments, Moments, Moments],
    encode: Tensor,
    dims: tuple[int, int],
    count: int,
    scale: float,
) -> list[int]:
    """Keep `count` heads of dims[1] units of a block's heads of dims[0]; return which."""
    query, key, context = moments[0].second("x"), moments[1].cov("x"), moments[2].cov("x")
    out = encode @ state[f"{block.o}.weight"]
    groups = list(torch.arange(len(query)).split(dims[0]))
    kept = sorted(greedy_groups(context, out, groups, count))
    queries, keys, values = [], [], []
    for index in (groups[h] for h in kept):
        eye = torch.eye(len(query), dtype=query.dtype)[:, index]
        own = context[index][:, index]
        if dims[0] == dims[1]:
            queries.append(eye)
            keys.append(eye)
            values.append(eye)
            continue
        of_query, of_key = reduce_scores(query[index][:, index], key[index][:, index], dims[1])
        queries.append(eye @ of_query)
        keys.append(eye @ of_key)
        values.append(eye @ reduce_values(own, out[:, index], dims[1]))
    _select(state, block.q, torch.cat(queries, dim=1) * scale)
    _select(state, block.k, torch.cat(keys, dim=1))
    push = torch.cat(values, dim=1)
    _select(state, block.v, push)
    _compensate(state, block.o, context, moments[2].mean("x"), push)
    return kept


def _reduce_units(
    state: State, block: Block, moments: Moments, encode: Tensor, count: int
) -> list[int]:
    """Keep `count` units of a block's MLP; return which."""
    cov = moments.cov("x")
    out = encode @ state[f"{block.down}.weight"]
    kept = sorted(greedy_groups(cov, out, list(torch.arange(len(cov))[:, None]), count))
    push = torch.eye(len(cov), dtype=cov.dtype)[:, kept]
    _select(state, block.up, push)
    _compensate(state, block.down, cov, moments.mean("x"), push)
    return kept


def _select(state: State, reader: str, push: Tensor) -> None:
    """Move the outputs of a reader by `push` (n, m)."""
    bias = reader_bias(state, reader)
    own = f"{reader}.bias" in state
    state[f"{reader}.weight"] = push.T @ state[f"{reader}.weight"]
    if own:
        state[f"{reader}.bias"] = push.T @ bias


def _compensate(state: State, writer: str, cov: Tensor, mean: Tensor, push: Tensor) -> None:
    """Let a writer read its n inputs x back from Aᵀx: W D, and W (E x - D Aᵀ E x) to its bias."""
    read = decoder(cov, push)
    weight = state[f"{writer}.weight"]
    if f"{writer}.bias" in state:
        state[f"{writer}.bias"] = state[f"{writer}.bias"] + weight @ (mean - read @ push.T @ mean)
    state[f"{writer}.weight"] = weight @ read


def _narrow_stream(
    state: State, family: Family, model: nn.Module, layout: Layout, encode: Tensor
) -> State:
    """Return canonical parameters with a stream moved by M (m, d)."""
    width, size = encode.shape
    biases = {r: reader_bias(state, r) for _, readers in norms(layout) for r in readers}
    map_ = LinearMap(encode.T, encode.T * (size / width) ** 0.5)
    moved = transform(state, family.atlas(model.config), {layout.stream_space: map_})
    for norm, readers in norms(layout):
        shift = state[f"{norm}.bias"][:1].expand(width)  # all zeros or all ones
        moved[f"{norm}.weight"] = torch.ones(width, dtype=torch.float64)
        moved[f"{norm}.bias"] = shift.clone()
        for reader in readers:
            set_reader_bias(moved, reader, biases[reader])
    return moved
