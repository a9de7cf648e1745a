"""The shape planner: from what a recipe wishes to a legal shape, with its reasons."""

from slimfuse.shapes.budget import Meter, largest
from slimfuse.shapes.ladder import grid, ladder
from slimfuse.shapes.proposal import HEADER, Option, Proposal, Refusal
from slimfuse.shapes.propose import resolve
from slimfuse.shapes.wish import AXES, Budget, Wish

__all__ = [
    "AXES",
    "HEADER",
    "Budget",
    "Meter",
    "Option",
    "Proposal",
    "Refusal",
    "Wish",
    "grid",
    "ladder",
    "largest",
    "resolve",
]
