"""The choices of the faithful mode, the stream's map after an addition, and which tokens count."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from slimfuse.families import Readout
from slimfuse.fuse.scoring import Saliency
from slimfuse.transport import Solver, TransportMap

Cost = Literal["activations", "weights", "combined"]
Masses = Literal["uniform", "norm", "saliency"]
Residual = Literal["none", "residual-only", "mean", "weighted-scalar", "weighted-matrix"]
QK = Literal["separate", "joint", "equal"]
Heads = Literal["kept", "crossed"]
Tokens = Literal["all", "class", "window"]
ParentWeights = Literal["equal", "fisher"]
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class TransportSettings:
    """The published choices (Imfeld et al. 2310.05719, §4-5).

    cost: "combined" is the sum of both, each divided by its mean. masses: "norm" is the norm of a
    unit's column-aligned weights; "saliency" the energy that a unit sends on, |W_out[:, i]| times
    the standard deviation of its activation, where W_out is the next norm's gain for the stream
    and the pair's other deviation for queries and keys; with another `saliency` than "energy" its
    scores of parent and anchor, see `scoring`. A head's queries and keys together have the mass of
    its outputs. qk: "joint" is one map from the sum of both costs, "equal" the
    queries' map for both. heads: "kept" matches whole heads first, exactly, and units inside
    them; "crossed" is one plan over all heads' units. tokens, window: see `kept_tokens`.
    anchor_weight: the anchor's share in 0 … 1 (None: as much as a parent of weight 1).
    parent_weights: "fisher" multiplies the shares of every tensor by the tensors' mean diagonal
    Fisher (`saliency.diagonal.traces`). seed: of saliencies' random numbers, where they have any.
    """

    solver: Solver = field(default_factory=Solver)
    cost: Cost = "activations"
    masses: Masses = "uniform"
    residual: Residual = "mean"
    qk: QK = "equal"
    heads: Heads = "kept"
    tokens: Tokens = "all"
    window: int = 1
    anchor_weight: float | None = None
    saliency: Saliency = "energy"
    parent_weights: ParentWeights = "equal"
    seed: int = 0

    @property
    def scored(self) -> bool:
        """Whether units have to be scored before."""
        return self.masses == "saliency" and self.saliency not in ("energy", "uniform")

    @property
    def needs_activations(self) -> bool:
        """Whether the models have to be run at all."""
        weighted = self.residual in ("weighted-scalar", "weighted-matrix")
        energies = self.masses == "saliency" and self.saliency == "energy"
        return self.cost != "weights" or energies or weighted


@dataclass(frozen=True)
class MapRecord:
    """What one map of one parent says about itself; see `TransportMap`."""

    parent: str
    name: str
    effective_units: float
    entropy: float
    marginal_error: float
    converged: bool
    cost: float


def record(parent: str, name: str, tmap: TransportMap) -> MapRecord:
    """Return the record of a map."""
    return MapRecord(
        parent=parent,
        name=name,
        effective_units=tmap.effective_units,
        entropy=tmap.entropy,
        marginal_error=tmap.marginal_error,
        converged=tmap.converged,
        cost=tmap.cost,
    )


def after_addition(
    policy: Residual,
    skip: TransportMap,
    branch: TransportMap,
    skip_norms: Tensor | None = None,
    branch_norms: Tensor | None = None,
) -> TransportMap:
    """Return the stream's map after skip + branch (Imfeld et al. 2310.05719, §4.1).

    π[:, j] = γ_j skip[:, j] + (1 - γ_j) branch[:, j], where γ is 0 for "none", 1 for
    "residual-only", 1/2 for "mean", ‖skip‖ / (‖skip‖ + ‖branch‖) for "weighted-scalar", and the
    same with the norms of unit j alone for "weighted-matrix". skip_norms, branch_norms: root mean
    squares (m,) of the anchor's units, which the weighted policies need. The mixed plan's own
    sums are its marginals; its cost is a mean of both and not a cost between units.
    """
    if policy == "none":
        return branch
    if policy == "residual-only":
        return skip
    share = torch.full((skip.plan.shape[1],), 0.5, dtype=torch.float64)
    if policy != "mean":
        assert skip_norms is not None and branch_norms is not None
        if policy == "weighted-scalar":
            skip_norms, branch_norms = skip_norms.norm(), branch_norms.norm()
        share = (skip_norms / (skip_norms + branch_norms).clamp_min(TINY)).expand_as(share)
    plan = share * skip.plan + (1 - share) * branch.plan
    gamma = float(share.mean())
    return TransportMap(
        plan,
        plan.sum(1),
        plan.sum(0),
        gamma * skip.cost + (1 - gamma) * branch.cost,
        max(skip.marginal_error, branch.marginal_error),
        skip.converged and branch.converged,
    )


def kept_tokens(kind: Tokens, window: int, tokens: int, readout: Readout, config: Any) -> Tensor:
    """Return the places of the tokens whose rows count.

    all: every token. class: the readout token alone. window, in a sequence: tokens at most
    `window` places from the readout token. window, in an image (`image_size` in the config, a
    square grid after the readout token): the readout token, which has no place in the image,
    and the patches whose row and column are at most `window` from the centre (side - 1) / 2.
    """
    place = torch.arange(tokens)
    if kind == "all":
        return place
    assert isinstance(readout, int), "which token is the first to count?"
    if kind == "class":
        return place[[readout]]
    side = round((tokens - 1) ** 0.5)
    if hasattr(config, "image_size") and readout == 0 and side * side == tokens - 1:
        near = (torch.arange(side) - (side - 1) / 2).abs() <= window
        patches = (near[:, None] & near[None, :]).reshape(-1).nonzero()[:, 0]
        return torch.cat([place[:1], 1 + patches])
    return place[(place - place[readout]).abs() <= window]
