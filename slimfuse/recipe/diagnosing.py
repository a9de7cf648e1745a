"""Diagnostics of a run's models: what they may cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slimfuse.recipe.strict import Count, Positive, Seed, Strict


class Diagnose(Strict):
    """Tables that say why the child works, how narrow it may be, and what INT8 costs where."""

    samples: Annotated[int, Field(ge=2, le=100_000)] = Field(
        64, description="Held-out samples, of the test split, that each table looks at."
    )
    probes: Count = Field(1, description="Random probes of each of them.")
    seconds: Positive = Field(
        300.0, description="Time of all tables together; each looks at two samples at least."
    )
    seed: Seed = Field(0, description="Seed of the draw and of the probes.")
