"""What a fusion leaves for the report: plain figures in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimfuse.fuse.refit import Fusion


def save_fusion(fusion: Fusion, parents: list[str], folder: Path) -> None:
    """Write fusion.json: the stream's spectrum, every part's refit error, where units came from."""
    plan = fusion.stream.plan
    record: dict[str, Any] = {
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
        "stream_errors": list(fusion.stream_errors),
        "parts": [
            {"layer": p.layer, "part": p.part, "error": p.error, "sources": p.sources}
            for p in fusion.parts
        ],
    }
    (folder / "fusion.json").write_text(json.dumps(record))


def load_fusion(folder: Path) -> dict[str, Any]:
    """Return what `save_fusion` wrote."""
    record: dict[str, Any] = json.loads((folder / "fusion.json").read_text())
    return record
