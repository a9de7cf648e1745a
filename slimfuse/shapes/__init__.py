"""The shape planner: from what a recipe wishes to a legal shape, with its reasons."""

from slimfuse.shapes.budget import Meter, largest
from slimfuse.shapes.descent import Losses, descent
from slimfuse.shapes.ladder import grid, ladder
from slimfuse.shapes.proposal import HEADER, Option, Proposal, Refusal
from slimfuse.shapes.propose import resolve
from slimfuse.shapes.wish import AXES, Budget, Wish

__all__ = [
    "AXES",
    "HEADER",
    "Budget",
    "Losses",
    "Meter",
    "Option",
    "Proposal",
    "Refusal",
    "Wish",
    "descent",
    "grid",
    "ladder",
    "largest",
    "resolve",
]
