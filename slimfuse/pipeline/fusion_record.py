"""What a fusion leaves for the report: plain figures in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isinf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimfuse.fuse.depth import Segments
from slimfuse.fuse.gauge_maps import Alignment
from slimfuse.fuse.refit import Fusion, Part
from slimfuse.fuse.transport import TransportFusion

STREAMS_FILE = "streams.safetensors"


def refitted(fusion: Fusion, parents: list[str]) -> dict[str, Any]:
    """Return the stream's spectrum, every part's refit error and strength, units' origins."""
    plan = fusion.stream.plan
    return {
        "parents": parents,
        "agreement": list(fusion.consensus.agreement),
        "energy": fusion.stream.energy.tolist(),
        "kept": fusion.stream.kept,
        "encode": fusion.stream.encode.tolist(),
        "plan": None
        if plan is None
        else {
            "plan": plan.plan.tolist(),
            "effective_units": plan.effective_units,
            "entropy": plan.entropy,
            "marginal_error": plan.marginal_error,
            "converged": plan.converged,
        },
        "segments": [[list(blocks) for blocks in parts] for parts in fusion.segments],
        "stream_errors": list(fusion.stream_errors),
        "parts": part_records(fusion.parts),
    }


def part_records(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return every fitted part: what it is, what it missed, how hard it held on, its origin."""
    return [
        {
            "layer": p.layer,
            "part": p.part,
            "error": p.error,
            "strength": _plain(p.strength),
            "left_out": p.left_out,
            "kept": p.kept,
            "sources": p.sources,
            "role": p.role,
            "saliency": p.saliency,
        }
        for p in parts
    ]


def stream_tensors(
    mixes: Sequence[Tensor], segments: Sequence[Segments], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the maps E_p (m, d_p) and the depths that face the child's blocks, by parents' names.

    An empty segment stands where the one before it ended.
    """
    found = {}
    for name, mix, own in zip(names, mixes, segments, strict=True):
        found[f"mix.{name}"] = mix.float().contiguous()
        depths, last = [], 0
        for segment in own:
            last = segment.stop if len(segment) else last
            depths.append(last)
        found[f"depths.{name}"] = torch.tensor(depths)
    return found


def averaged(found: Sequence[Alignment], parents: list[str]) -> dict[str, Any]:
    """Return how well each further parent agrees with the first once it is aligned."""
    alignment = [
        {"stream": a.stream, "heads": list(a.heads), "units": list(a.units)} for a in found
    ]
    return {"averaged": parents, "alignment": alignment}


def transported(fusion: TransportFusion, parents: list[str]) -> dict[str, Any]:
    """Return what every transport map says of itself, and the shares of the average."""
    return {
        "parents": parents,
        "weights": list(fusion.weights),
        "maps": [
            {
                "parent": m.parent, "name": m.name, "effective_units": m.effective_units,
                "entropy": m.entropy, "marginal_error": m.marginal_error, "converged": m.converged,
                "cost": m.cost,
            }
            for m in fusion.maps
        ],
    }  # fmt: skip


PARTS = {
    "q": "query", "k": "key", "v": "value", "o": "attention output", "up": "MLP in",
    "gate": "MLP gate", "down": "MLP out",
}  # fmt: skip
OTHERS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention output",
          "fc1": "MLP in", "fc2": "MLP out", "classifier": "head"}  # fmt: skip


def part_name(record: Mapping[str, Any]) -> str:
    """Return what a fitted part is called, by its role in a block or by its own name."""
    own = str(record["part"])
    return PARTS.get(record.get("role", ""), OTHERS.get(own, own))


def _plain(strength: float | str) -> float | str:
    return "inf" if isinstance(strength, float) and isinf(strength) else strength


def save_fusion(record: dict[str, Any], folder: Path) -> None:
    """Write fusion.json."""
    (folder / "fusion.json").write_text(json.dumps(record))


def load_fusion(folder: Path) -> dict[str, Any]:
    """Return what `save_fusion` wrote."""
    record: dict[str, Any] = json.loads((folder / "fusion.json").read_text())
    return record
