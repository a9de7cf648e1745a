"""How a model is pruned: the settings of `sparsify`, and the schedule of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from slimfuse.errors import UserError
from slimfuse.saliency import obs
from slimfuse.saliency.fisher import MEMORY
from slimfuse.saliency.inverse import DAMPING, Damping, Route
from slimfuse.saliency.patterns import UNSTRUCTURED, Pattern
from slimfuse.saliency.weight_scores import WEIGHT_SCORERS, WeightScorer


@dataclass(frozen=True)
class Spec:
    """How a model is pruned.

    sparsity: share of zeros at the end, of all layers together (joint) or of each (not joint);
    None where the pattern says it. update: how the other weights make up for the removed, by
    default jointly for WoodFisher and WoodTaylor and not at all for scorers that need no block
    Fisher. block: weights in a block of the Fisher, None for one block a layer. damping: where
    relative, to a layer's mean g², or if one threshold compares layers to the geometric mean of
    that and the mean over all (docs/decisions/0013). steps: of the cubic schedule from `initial`,
    the Fisher new in each. memory: bytes of sums in one pass over the gradients. seed: of random
    scores and of labels that are drawn.
    """

    sparsity: float | None = None
    scorer: WeightScorer = "woodfisher"
    pattern: Pattern = UNSTRUCTURED
    joint: bool = True
    update: obs.Update | None = None
    block: int | None = 50
    damping: Damping = DAMPING
    steps: int = 1
    initial: float = 0.0
    route: Route | None = None
    memory: int = MEMORY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scorer not in WEIGHT_SCORERS:
            raise UserError("there is no such saliency of weights", where="scorer",
                            got=self.scorer, allowed=", ".join(WEIGHT_SCORERS))  # fmt: skip
        if self.sparsity is None and self.pattern.sparsity is None:
            raise UserError("how many zeros?", where="sparsity", got=None,
                            hint="give a share of zeros, or a pattern as 2:4")  # fmt: skip
        own = self.pattern.sparsity
        if own is not None and self.sparsity not in (None, own):
            raise UserError(f"the pattern {self.pattern} has a sparsity of its own",
                            where="sparsity", got=self.sparsity, allowed=own)  # fmt: skip
        if not (0 <= self.initial <= self.final < 1 and self.steps >= 1):
            raise UserError("this schedule can't be followed", where="sparsity",
                            got=f"from {self.initial} to {self.final} in {self.steps} steps",
                            allowed="0 <= initial <= sparsity < 1, at least 1 step")  # fmt: skip
        if self.route == "rank-one" or (self.block is not None and self.block < 1):
            raise UserError("this block Fisher can't be made", where="route, block",
                            got=f"{self.route}, {self.block}",
                            allowed="route gram, samples or None; block at least 1")  # fmt: skip

    @property
    def final(self) -> float:
        """The share of zeros at the end."""
        own = self.pattern.sparsity
        return own if own is not None else self.sparsity or 0.0

    @property
    def compares_layers(self) -> bool:
        """Whether scores of one layer are compared with those of others."""
        return self.joint and self.pattern.keep is None

    @property
    def updating(self) -> obs.Update:
        """The update that is made."""
        return self.update or ("joint" if WEIGHT_SCORERS[self.scorer].needs == "block" else "none")


def cubic(step: int, steps: int, initial: float, final: float) -> float:
    """Return s_t = s_f + (s_i − s_f)(1 − t)³ after `step` of `steps`, t = step/steps.

    Source: Zhu and Gupta 2017 (arXiv 1710.01878), equation 1.
    """
    return final + (initial - final) * (1 - step / steps) ** 3
