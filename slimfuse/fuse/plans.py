"""Transport plans of a fusion: what a recipe asks for in vain is the recipe's error."""

from __future__ import annotations

from torch import Tensor

from slimfuse.errors import UserError
from slimfuse.transport import Solver, TransportMap, solve


def planned(what: str, cost: Tensor, solver: Solver) -> TransportMap:
    """Return the plan of uniform masses; UserError where the solver's softness can't be had."""
    try:
        return solve(cost, solver=solver)
    except ValueError as error:
        raise unsolvable(what, error) from error


def unsolvable(what: str, error: ValueError) -> UserError:
    """Return the error of a plan that can't be solved as asked."""
    return UserError(
        f"the transport plan of {what} can't be solved as asked",
        where="fuse.ot",
        got=str(error),
        hint="ask for other effective_units, or give reg, which every space can have",
    )
