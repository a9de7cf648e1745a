"""Transport: costs, masses, plans, and the two sides of a map."""

from slimfuse.transport.cost import combine, correlation, raw_cost, standardised_cost, weight_cost
from slimfuse.transport.maps import TransportMap, from_assignment, from_plan
from slimfuse.transport.masses import masses, uniform
from slimfuse.transport.solve import Solver, solve

__all__ = [
    "Solver", "TransportMap", "combine", "correlation", "from_assignment", "from_plan", "masses",
    "raw_cost", "solve", "standardised_cost", "uniform", "weight_cost",
]  # fmt: skip
