"""One map for the whole residual stream: the parents' consensus, then a narrower basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from slimfuse.families import NormKind
from slimfuse.fuse.greedy import greedy_groups
from slimfuse.fuse.plans import planned
from slimfuse.fuse.solve import RANK_TOLERANCE, decoder, directed, roots
from slimfuse.transport import Solver, TransportMap, from_assignment, standardised_cost

EXACT = Solver()
TINY = torch.finfo(torch.float64).tiny
METRIC_FLOOR = 1e-2  # of its mean diagonal: no direction is free

StreamMethod = Literal["pca", "gradient-pca", "select", "ot", "cluster"]


@dataclass(frozen=True)
class Consensus:
    """The parents' streams brought into the anchor's (first parent's) coordinates.

    Consensus stream y = Σ_p mix_p x_p. mixes: (d, d_p) each, weights and channel centring
    included; readbacks: (d_p, d), x_p ≈ readback_p y; second: E[y yᵀ] (d, d), every row divided
    by the anchor's norm so that all depths count alike; agreement: share of the anchor's energy
    that each parent's stream explains linearly.
    """

    mixes: tuple[Tensor, ...]
    readbacks: tuple[Tensor, ...]
    second: Tensor
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class StreamMap:
    """Target stream z = encode · y, y ≈ decode · z. encode: (m, d), decode: (d, m).

    energy: share of the consensus' normalised energy that each direction holds, largest first.
    plan: the transport plan, where the method has one.
    """

    encode: Tensor
    decode: Tensor
    energy: Tensor
    kept: float
    plan: TransportMap | None = None


def centring(size: int) -> Tensor:
    """Return the projection (size, size) that removes the mean over channels."""
    eye = torch.eye(size, dtype=torch.float64)
    return eye - 1 / size


def consensus(
    joint: Tensor, widths: Sequence[int], weights: Sequence[float], *, centred: bool = True
) -> Consensus:
    """Return the anchored consensus of the parents' streams (fusion.md §3).

    joint: E[x xᵀ / |P x_1|²] (Σd, Σd) of the concatenated streams; R_p = argmin E|x_1 - R x_p|²
    on the channel-centred streams, or on the streams as they are (post-norm, RMSNorm: what reads
    them sees their mean over channels). A parent's weight is multiplied by the square of the share
    of the anchor's energy that it explains: a stream that agrees poorly would blur the anchor's
    (docs/decisions/0003).
    """
    cuts = torch.tensor([0, *widths]).cumsum(0).tolist()
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    projects = [centring(d) if centred else torch.eye(d, dtype=torch.float64) for d in widths]
    project = torch.block_diag(*projects)
    joint = project @ joint @ project
    anchor = parts[0]
    backs, trusted, agreement = [], [], []
    for part, weight, own in zip(parts, weights, projects, strict=True):
        back = own if part is anchor else joint[anchor, part] @ _pinv(joint[part, part]) @ own
        whole = joint[anchor, anchor].trace().clamp_min(TINY)
        explained = (back @ joint[part, part] @ back.T).trace() / whole
        agreement.append(float(explained))
        backs.append(back)
        trusted.append(weight * agreement[-1] ** 2)
    mixes = [back * (trust / sum(trusted)) for back, trust in zip(backs, trusted, strict=True)]
    stacked = torch.cat(mixes, dim=1)
    second = stacked @ joint @ stacked.T
    inverse = _pinv(second)
    readbacks = tuple(joint[part] @ stacked.T @ inverse for part in parts)
    return Consensus(tuple(mixes), readbacks, second, tuple(agreement))


def stream_map(
    second: Tensor,
    width: int,
    method: StreamMethod,
    *,
    solver: Solver = EXACT,
    metric: Tensor | None = None,
    norm: NormKind = "layer",
) -> StreamMap:
    """Return the map of a stream with second moment (d, d) onto `width` channels.

    pca: top directions in an output basis orthogonal to the all-ones vector, so that the target's
    LayerNorm loses nothing (width - 1 useful directions); under RMSNorm, which keeps the mean over
    channels, all `width` of them. gradient-pca: the same for the row space
    of the top directions of G^½ S G^½, G the `metric` (d, d) of the loss' gradients: what the loss
    uses rather than what is loud. select: greedy choice of channels. ot: plan from all channels to
    the selected ones. cluster: k-means of the channels, the hard free-support barycentre.
    """
    values, vectors = torch.linalg.eigh(second)
    values, vectors = values.flip(0).clamp_min(0), directed(vectors.flip(1))
    energy = values / values.sum().clamp_min(TINY)
    plan: TransportMap | None = None
    centred = norm == "layer"
    basis = _basis(width) if centred else torch.eye(width, dtype=torch.float64)
    if method == "pca":
        top = vectors[:, : basis.shape[1]]
        encode = basis @ top.T
        decode = encode.T
    elif method == "gradient-pca":
        assert metric is not None, "gradient-pca needs the gradients' second moment"
        top = _weighted_directions(second, metric, basis.shape[1], centred=centred)
        encode = basis @ top.T
        decode = decoder(second, encode.T)
    else:
        chosen = torch.tensor(pivots(second, width))
        variance = second.diagonal()
        if method == "select":
            encode = torch.eye(len(second), dtype=torch.float64)[chosen]
        elif method == "ot":
            cost = standardised_cost(second[:, chosen], variance, variance[chosen])
            plan = planned("the stream", cost, solver)
            encode = plan.push.T
        else:
            plan = from_assignment(_cluster(second, width), width)
            encode = plan.push.T
        decode = decoder(second, encode.T)
    left = second - decode @ encode @ second
    left = left - (left @ encode.T) @ decode.T
    kept = 1 - float(left.trace().clamp_min(0) / second.trace().clamp_min(TINY))
    return StreamMap(encode, decode, energy, kept, plan)


def _weighted_directions(second: Tensor, metric: Tensor, count: int, *, centred: bool) -> Tensor:
    """Return an orthonormal basis (d, count) of the row space of the top of G^½ S G^½."""
    size = len(second)
    project = centring(size) if centred else torch.eye(size, dtype=torch.float64)
    metric = project @ metric @ project
    metric = metric + METRIC_FLOOR * metric.diagonal().mean() * project
    root, _ = roots(metric)
    _, vectors = torch.linalg.eigh(root @ second @ root)
    basis: Tensor = torch.linalg.qr(root @ directed(vectors[:, -count:]))[0]
    return basis


def pivots(second: Tensor, count: int) -> list[int]:
    """Return `count` channels that explain the others best (greedy, see `greedy_groups`)."""
    singles = list(torch.arange(len(second))[:, None])
    return sorted(greedy_groups(second, torch.eye(len(second), dtype=second.dtype), singles, count))


def _cluster(second: Tensor, count: int) -> Tensor:
    """Return the cluster (d,) of every channel: k-means on rows of the standardised C^½."""
    from sklearn.cluster import KMeans

    values, vectors = torch.linalg.eigh(second)
    points = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
    means = KMeans(count, n_init=4, random_state=0).fit(points.numpy())
    return torch.as_tensor(means.labels_, dtype=torch.long)


def _basis(size: int) -> Tensor:
    """Return an orthonormal basis (size, size - 1) of the vectors whose entries sum to 0."""
    helmert = torch.zeros(size, size - 1, dtype=torch.float64)
    for k in range(1, size):
        helmert[:k, k - 1] = 1 / (k * (k + 1)) ** 0.5
        helmert[k, k - 1] = -k / (k * (k + 1)) ** 0.5
    return helmert


def _pinv(matrix: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(matrix, rtol=RANK_TOLERANCE, hermitian=True)
    return inverse
