"""The report's section "why": a run's diagnostics, made once and kept as a stage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.diagnosing import Diagnosing, Subject, subject
from slimfuse.pipeline.fusion_record import load_fusion, part_name
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.stages import BaseStages
from slimfuse.report import Finding
from slimfuse.store import Stage

TABLES = "tables.json"


def why(stages: BaseStages, fused: Stage, child: Stage) -> tuple[Finding, ...]:
    """Return the tables of a run whose recipe has `diagnose`, none without it."""
    spec, job = getattr(stages.job.recipe, "diagnose", None), stages.job
    if spec is None or not isinstance(job, Job):
        return ()
    parents = [(p.name, *stages.parent(p)) for p in job.parents]
    inputs = stages.base | {
        "diagnose": spec.model_dump(mode="json"), "parents": [key for *_, key in parents],
        "fused": fused.key, "child": child.key,
    }  # fmt: skip

    def build(folder: Path) -> None:
        found: list[Subject] = [subject(job, name, home) for name, home, _ in parents]
        found.append(subject(job, "child", child.path))
        tables = Diagnosing(job, spec, found).tables()
        refit = refit_table(load_fusion(fused.path), calibrated(job))
        write_tables((*tables, *refit), folder / TABLES)

    made = stages.store.stage("diagnosis", inputs, build)
    return read_tables(made.path / TABLES)


def calibrated(job: BaseJob) -> int:
    """Return how many samples a run's fusion saw."""
    return min(job.recipe.data.calibration.samples, job.count("train"))


def refit_table(record: Mapping[str, Any], samples: int) -> tuple[Finding, ...]:
    """Return what a refit's leave-one-out said, from what the fusion left; nothing without it."""
    parts = [p for p in record.get("parts", ()) if p.get("left_out") is not None]
    if not parts:
        return ()
    rows, stayed = [], 0
    for p in parts:
        untouched = p["strength"] == "untouched"
        stayed += untouched
        kept = "–" if p["kept"] is None else f"{p['kept']:.4f}"
        strength = p["strength"] if isinstance(p["strength"], str) else f"{p['strength']:.1e}"
        rows.append((f"layer {p['layer']} {part_name(p)}", strength, f"{p['left_out']:.4f}", kept,
                     "as it was" if untouched else "refitted"))  # fmt: skip
    worst = max(p["left_out"] for p in parts)
    enough = not stayed and worst < 1
    return (
        Finding(
            "Whether the calibration set was enough",
            f"{samples} calibration samples; errors of layers on a sample that its fit did not "
            "see (exact leave-one-out), as shares of the goal's variance.",
            ("layer", "λ", "left out", "untouched", "kept"),
            tuple(rows),
            "The calibration set is enough: every refit helps samples it did not see."
            if enough
            else f"{stayed} of {len(parts)} parts were better left alone: give more calibration "
            "samples (data.calibration.samples).",
        ),
    )


def write_tables(tables: Iterable[Finding], file: Path) -> None:
    """Write tables as JSON."""
    file.write_text(json.dumps([asdict(t) for t in tables], ensure_ascii=False, indent=1))


def read_tables(file: Path) -> tuple[Finding, ...]:
    """Return what `write_tables` wrote."""
    found = []
    for one in json.loads(file.read_text()):
        rows = tuple(tuple(row) for row in one["rows"])
        found.append(Finding(**{**one, "columns": tuple(one["columns"]), "rows": rows}))
    return tuple(found)
