"""Recipes of two parents, and looks at the starts that are made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfuse.pipeline.pictures import pictures
from slimfuse.pipeline.stages import Stages
from slimfuse.report.figures import draw

HALF = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
SAME = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
TWINS = [{"name": "a", "from": "slim"}, {"name": "b", "from": "twin"}]
MIXED = [{"name": "a", "from": "wide"}, {"name": "b", "from": "deep"}]


def scores(made: Stages, kind: str = "fused") -> Tensor:
    """Return a start's test logits, checked to be those of a model that looks at its images."""
    found = made.evidence(made.start(kind))["logits"]
    assert found.shape == (60, 10) and bool(torch.isfinite(found).all())
    assert not bool((found == found[0]).all())
    return found


def shown(made: Stages) -> set[str]:
    """Return the groups of the report's pictures of the start; none may crash."""
    fused = made.start("fused")
    names = {p.name for p in made.job.parents}
    tested = {n: {"logits": torch.zeros(60, 10)} for n in (*names, "finetuned")}
    best = min(names)
    found = pictures(made.job, fused, {}, best, tested)
    assert all(draw(p).startswith("<svg") for p in found)
    return {p.group for p in found}


ANCHOR = {"anchor": {"from": "anchor"}}
