"""Parents and targets of different depth: which of a parent's blocks each target block replaces.

A segment is a run of a parent's consecutive blocks that one target block stands for; the segments
of a parent cover all its blocks in order. A parent that is shallower than the target has empty
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from slimfuse.batch import Inputs, token_mask
from slimfuse.errors import ShapeError
from slimfuse.families import Layout
from slimfuse.fuse import walk

Segments = tuple[range, ...]
ROWS = 4096  # tokens that decide which depths are alike …
SAMPLES = 16  # … from so many samples of each batch


def match_depths(
    models: Sequence[nn.Module],
    layouts: Sequence[Layout],
    depth: int,
    batches: Callable[[], Iterable[Inputs]],
    given: Sequence[Sequence[int]] | None = None,
) -> list[Segments]:
    """Return every parent's segments for a target of `depth` blocks.

    The deepest parent's blocks are grouped so that blocks that change the stream least share a
    segment (`group`), unless `given` lists them; the others are cut where their streams are most
    like its own at its cuts (`align`). Similarity is linear CKA. Parents of the target's depth
    keep their blocks as they are, if nothing is given. Raises ShapeError when `given` doesn't
    cover the blocks.
    """
    depths = [len(layout.blocks) for layout in layouts]
    whole = tuple(range(i, i + 1) for i in range(depth))
    if given is None and set(depths) == {depth}:
        return [whole] * len(depths)
    deepest = depths.index(max(depths))
    streams = [_sample(m, layout, batches()) for m, layout in zip(models, layouts, strict=True)]
    if given is not None:
        first = _checked(given, depth, depths[deepest])
    else:
        steps = [cka(a, b) for a, b in pairwise(streams[deepest])]
        first = group([1 - s for s in steps], depth)
    cuts = [0, *(segment.stop for segment in first)]
    found: list[Segments] = []
    for own, count in zip(streams, depths, strict=True):
        if count == depths[deepest]:
            found.append(first)
        elif count == depth and given is None:
            found.append(whole)
        else:
            anchor = streams[deepest]
            likeness = torch.tensor([[cka(anchor[c], x) for x in own] for c in cuts])
            found.append(align(likeness))
    return found


def group(changes: Sequence[float], depth: int) -> Segments:
    """Return `depth` non-empty segments of blocks with these changes of the stream.

    A segment costs what its blocks change together less the largest of them, which the target's
    block takes over; the total is the least (dynamic programming), ties go to even lengths.
    """
    count = len(changes)
    if not 1 <= depth <= count:
        raise ShapeError(
            "the target can't be deeper than its deepest parent",
            where="target.num_hidden_layers",
            got=depth,
            allowed=f"1 … {count}",
        )

    def cost(a: int, b: int) -> tuple[float, int]:
        part = changes[a:b]
        return sum(part) - max(part), (b - a) ** 2

    best: dict[tuple[int, int], tuple[float, int, tuple[int, ...]]] = {(0, 0): (0.0, 0, ())}
    for t in range(1, depth + 1):
        for b in range(t, count - (depth - t) + 1):
            options = []
            for a in range(t - 1, b):
                if (t - 1, a) in best:
                    before, even, cuts = best[t - 1, a]
                    lost, square = cost(a, b)
                    options.append((round(before + lost, 12), even + square, (*cuts, b)))
            best[t, b] = min(options)
    cuts = (0, *best[depth, count][2])
    return tuple(range(a, b) for a, b in pairwise(cuts))


def align(likeness: Tensor) -> Segments:
    """Return the segments whose cuts are most like the anchor's, in order.

    likeness: (cuts of the anchor, depths of the parent), first and last are tied to each other.
    Ties go to the evenest cuts.
    """
    rows, columns = likeness.shape
    evenness = torch.tensor(
        [[abs(c - r * (columns - 1) / (rows - 1)) for c in range(columns)] for r in range(rows)]
    )
    score = likeness.double() - 1e-9 * evenness
    total = torch.full((rows, columns), -torch.inf, dtype=torch.float64)
    total[0, 0] = score[0, 0]
    for r in range(1, rows):
        total[r] = score[r] + total[r - 1].cummax(0).values
    cuts = [columns - 1]
    for r in range(rows - 2, -1, -1):
        cuts.append(int(total[r, : cuts[-1] + 1].argmax()))
    cuts.reverse()
    return tuple(range(a, b) for a, b in pairwise(cuts))


def cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA (0 … 1) of two centred samples (n, d_x) and (n, d_y).

    ‖xᵀy‖² / (‖xᵀx‖ ‖yᵀy‖). Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 4.
    """
    cross, own, other = x.T @ y, x.T @ x, y.T @ y
    return float(cross.square().sum() / (own.norm() * other.norm()).clamp_min(1e-30))


def _sample(model: nn.Module, layout: Layout, batches: Iterable[Inputs]) -> list[Tensor]:
    """Return centred rows (≤ ROWS, d) of the stream before the first and after every block."""
    kept: list[list[Tensor]] = [[] for _ in range(len(layout.blocks) + 1)]
    seen, samples = 0, SAMPLES
    for batch in batches:
        few = batch[:samples]
        mask = token_mask(few)
        real = None if mask is None else mask.flatten().nonzero()[:, 0]
        for depth, x in enumerate(walk.streams(model, layout, few)):
            if depth % 2 == 0:
                kept[depth // 2].append(walk.rows(x, real))
        seen += len(kept[0][-1])
        if seen >= ROWS:
            break
    whole = [torch.cat(parts)[:ROWS] for parts in kept]
    return [x - x.mean(0) for x in whole]


def _checked(given: Sequence[Sequence[int]], depth: int, count: int) -> Segments:
    flat = [layer for part in given for layer in part]
    if flat != list(range(count)) or len(given) != depth or not all(given):
        raise ShapeError(
            "the layers don't list every block of the deepest parent once, in order",
            where="fuse.layers",
            got=[list(part) for part in given],
            allowed=f"{depth} lists, one a target block, of the blocks 0 … {count - 1}",
        )
    return tuple(range(part[0], part[-1] + 1) for part in given)
