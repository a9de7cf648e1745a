"""Transport: costs, plans, and the two sides of a map."""

from slimfuse.transport.cost import correlation, raw_cost, standardised_cost
from slimfuse.transport.maps import TransportMap, from_assignment, from_plan
from slimfuse.transport.solve import solve, uniform

__all__ = [
    "TransportMap", "correlation", "from_assignment", "from_plan", "raw_cost", "solve",
    "standardised_cost", "uniform",
]  # fmt: skip
