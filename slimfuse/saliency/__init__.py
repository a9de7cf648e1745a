"""Saliency: how much would be lost if a unit went."""

from slimfuse.saliency import activity, diagonal, mask_fisher, ziplm  # noqa: F401  they register
from slimfuse.saliency.magnitude import magnitude
from slimfuse.saliency.units import SCORERS, Scorer, Scores, Subject, masses, score

__all__ = ["SCORERS", "Scorer", "Scores", "Subject", "magnitude", "masses", "score"]
