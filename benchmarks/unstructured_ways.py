"""What `unstructured.py` compares: nets, scorers with their updates, dampings."""

from __future__ import annotations

from dataclasses import dataclass

from slimfuse.saliency.inverse import Damping
from slimfuse.saliency.obs import Update
from slimfuse.saliency.weight_scores import WeightScorer

PUBLISHED = Damping(1e-5, relative=False)


@dataclass(frozen=True)
class Net:
    """What is pruned: its models' names, and the Fisher's settings, its damping the library's.

    samples: gradients; taught: AdamW steps after each of the 8 steps of the schedule.
    """

    name: str
    model: str
    block: int
    damping: Damping
    samples: int
    taught: int
    batch: int
    rate: float

    def settings(self) -> str:
        """Return the Fisher's settings in words."""
        return f"B = {self.block}, m = {self.samples}, λ = {told(self.damping)}"


NETS = {
    "mlp": Net("MLP 784-400-200-100-10", "nets-mlp-{seed}", 200, Damping(), 1000, 25, 128, 3e-4),
    "vit": Net("ViT 6 × 128", "fashion-{seed}-a", 50, Damping(), 1000, 10, 64, 3e-4),
}
DAMPINGS = {
    "relative 1e-1 (the library's)": Damping(),
    "relative 1e-2": Damping(1e-2),
    "relative 1": Damping(1.0),
    "absolute 1e-5 (published)": PUBLISHED,
    "absolute 1e-7": Damping(1e-7, relative=False),
}


@dataclass(frozen=True)
class Way:
    """A scorer, the update after it, and a damping where it isn't the net's."""

    scorer: WeightScorer
    update: Update = "none"
    damping: Damping | None = None

    def __str__(self) -> str:
        own = f", λ = {told(self.damping)}" if self.damping else ""
        return f"{self.scorer}, {UPDATES[self.update]}{own}"


UPDATES = {"none": "no update", "single": "single update", "joint": "joint update"}
JOINT = [
    *(Way("woodfisher", update) for update in UPDATES),
    *(Way("woodtaylor", update) for update in UPDATES),
    Way("diagonal-fisher"),
    Way("magnitude"),
    Way("magnitude", "joint"),
    Way("random"),
]
INDEPENDENT = [
    *(Way("woodfisher", update) for update in UPDATES),
    Way("woodtaylor", "joint"),
    Way("diagonal-fisher"),
    Way("magnitude"),
    Way("random"),
]
ORDERS = {
    f"{name} damping": [
        Way("woodfisher", "joint", damping), Way("diagonal-fisher", "none", damping),
        Way("magnitude"), Way("random"),
    ]
    for name, damping in (("the library's", None), ("the published", PUBLISHED))
}  # fmt: skip


def told(damping: Damping) -> str:
    """Return a damping in words."""
    return f"{damping.value:g} of mean g²" if damping.relative else f"{damping.value:g}"
