"""From measurements to the report: rows, speed-ups, gates, pictures, warnings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimfuse.pipeline import protecting
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.fusion_record import load_fusion
from slimfuse.pipeline.mistakes import mistakes
from slimfuse.pipeline.moved import moved
from slimfuse.pipeline.pictures import pictures
from slimfuse.pipeline.planning import Plan
from slimfuse.pipeline.sparse import Sparse
from slimfuse.pipeline.sparse_report import (
    STATEMENT,
    SparseFiles,
    layers,
    sparse_pictures,
    zeros_note,
)
from slimfuse.pipeline.stages import Figures
from slimfuse.recipe import Gate
from slimfuse.report import (
    Example,
    Figure,
    Finding,
    GateResult,
    Latency,
    Report,
    Row,
    Speedup,
    Tried,
)
from slimfuse.report import Stage as StageName
from slimfuse.store import Stage
from slimfuse.tasks import Evidence


@dataclass(frozen=True)
class Measurements:
    """All that a run found out, by row name. sparse, files: of a sparse child; passages: of
    a language model.

    command, lock, timings, bench: known at its end; bench: see `Deployment.bench`.
    """

    job: BaseJob
    plan: Plan
    measured: dict[str, Figures]
    parents: dict[str, tuple[Path, str]]
    anchor: Path | None
    parity: dict[str, float]
    fused: Stage
    finetuned: Stage
    sparse: Sparse | None
    files: SparseFiles | None
    baselines: dict[str, Stage]
    starts: dict[str, Figures]
    control: Stage | None
    package: Stage
    tried: tuple[Tried, ...]
    int8: Stage | None
    int8_dropped: bool
    evidence: dict[str, Evidence]
    batches: dict[str, int]
    why: tuple[Finding, ...] = ()
    passages: tuple[Example, ...] = ()
    command: str = ""
    lock: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)


def make_report(m: Measurements) -> Report:
    """Return the report of a run."""
    bench = m.bench
    speedups = tuple(
        Speedup(r["base"], r["other"], r["threads"], r["batch"],
                1 / r["value"], 1 / r["high"], 1 / r["low"])
        for r in bench["ratios"]
    )  # fmt: skip
    rows = tuple(_rows(m, bench["latencies"]))
    child = m.plan.models[-1]
    wrong, tables, examples = mistakes(m.job, best_parent(m), m.evidence)
    others = moved(m.job, best_parent(m), m.evidence, m.passages)
    return Report(
        name=m.job.recipe.name,
        recipe_path=str(m.job.path) if not m.job.path.is_absolute() else m.job.path.name,
        command=m.command,
        summary=f"{_fused(m.job)} on {m.job.data.name}, {_became(m.job)} {child.shape}",
        rows=rows,
        speedups=speedups,
        gates=tuple(_gate(gate, m, speedups) for gate in m.job.recipe.gates),
        pictures=tuple(
            pictures(
                m.job,
                m.fused,
                {"fused start": m.finetuned, **m.baselines},
                best_parent(m),
                m.evidence,
            )
        )
        + tuple(wrong)
        + (tuple(sparse_pictures(m.sparse)) if m.sparse is not None else ()),
        settings=m.lock,
        environment=bench["environment"] | {
            "torch threads": str(m.job.threads), "training precision": m.job.precision,
        },
        timings=m.timings,
        warnings=tuple(_warnings(m, bench["latencies"])),
        metric=m.job.task.metric.key,
        zeros=layers(m.sparse.child) if m.sparse is not None else (),
        sizes=m.files.sizes if m.files is not None else (),
        findings=(*protecting.findings(m.finetuned), *m.why, *tables, *others[0]),
        examples=examples + others[1],
        chosen=others[2],
        tried=m.tried,
    )  # fmt: skip


def _became(job: BaseJob) -> str:
    alone = job.recipe.fuse.method in ("keep", "unfused")
    return "kept at its own shape:" if alone else "fused into one model"


def _fused(job: BaseJob) -> str:
    used, count = len(job.fused), len(job.parents)
    return f"{used}{f' of {count}' * (used < count)} parent{'s' * (count > 1)}"


def best_parent(m: Measurements) -> str:
    """Return the name of the best parent by the task's metric."""
    metric = m.job.task.metric
    return metric.best({name: m.measured[name][metric.key].value for name in m.parents})


def _rows(m: Measurements, latencies: list[dict[str, Any]]) -> list[Row]:
    *planned, child = m.plan.models
    shapes = {p.name: p for p in planned}

    def timed(name: str) -> tuple[Latency, ...]:
        keys = Latency.__dataclass_fields__
        return tuple(
            Latency(**{k: entry[k] for k in keys if k in entry})
            for entry in latencies
            if entry["name"] == name
        )

    def figures(name: str) -> dict[str, Figure]:
        note = f"test set, at batch {m.batches[name]}" if name in m.batches else "test set"
        return {
            key: Figure(x.value, n=x.n, low=x.low, high=x.high, note=note)
            for key, x in m.measured[name].items()
        }

    rows = []
    for name, (folder, _) in m.parents.items():
        p = shapes[name]
        rows.append(
            Row(name, "parent", figures(name), p.params, p.flops, _size(folder), timed(name),
                m.parity[name], "latency of its ONNX file")
        )  # fmt: skip
    if m.anchor is not None:
        p = shapes["anchor"]
        rows.append(
            Row("anchor", "baseline", figures("anchor"), p.params, p.flops, _size(m.anchor),
                note="the trained narrow model that method ot moves the parents to")
        )  # fmt: skip
    rows.append(
        Row("fused", "fused", figures("fused"), child.params, child.flops, _size(m.fused.path))
    )
    dense = m.files is not None
    rows.append(
        Row("finetuned", "finetuned", figures("finetuned"), child.params, child.flops,
            _size(m.finetuned.path), timed("finetuned"), m.parity.get("finetuned"),
            "dense; latency of its ONNX file" if dense else "")
    )  # fmt: skip
    if m.sparse is not None:
        for made in m.sparse.every:
            kind: StageName = "sparse" if made is m.sparse.child else "baseline"
            rows.append(
                Row(made.row, kind, figures(made.row), child.params, child.flops,
                    _size(made.stage.path), note=zeros_note(m.job, m.sparse, made))
            )  # fmt: skip
    onnx = m.package.path / "onnx" / "model.onnx"
    rows.append(
        Row("onnx", "onnx", figures("onnx"), child.params, child.flops, onnx.stat().st_size,
            timed("onnx"), m.parity["onnx"])
    )  # fmt: skip
    if m.int8 is not None:
        folder = m.int8.path if m.int8_dropped else m.package.path / "onnx"
        file, note = folder / "model_quantized.onnx", ""
        if m.int8_dropped:
            note = "not shipped: it loses more than max_drop, decided on the test set"
        elif m.job.recipe.export.quantize.mode != "dynamic":
            note = "shipped: it loses no more than max_drop, decided on the test set"
        rows.append(
            Row("onnx-int8", "onnx-int8", figures("onnx-int8"), child.params, child.flops,
                file.stat().st_size, timed("onnx-int8"), note=note)
        )  # fmt: skip
    if m.control is not None and "random-refit" not in m.baselines:
        rows.append(
            Row("random-refit", "baseline", figures("random-refit"), child.params, child.flops,
                _size(m.control.path),
                note="control, no training: what the same refit makes of a random model")
        )  # fmt: skip
    for name, stage in m.baselines.items():
        metric = m.job.task.metric
        before = m.starts[name][metric.key] if name in m.starts else None
        begun = f"{metric.amount(before.value)} before it; " if before is not None else ""
        rows.append(
            Row(name, "baseline", figures(name), child.params, child.flops, _size(stage.path),
                note=f"{begun}same finetuning budget and teachers")
        )  # fmt: skip
    return rows


def _size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def _gate(gate: Gate, m: Measurements, speedups: tuple[Speedup, ...]) -> GateResult:
    best = best_parent(m)
    metric = next((k for k in m.job.task.metrics if k.key == gate.metric), None)
    if metric is not None:
        drop = metric.loss(*(m.measured[row][metric.key].value for row in ("onnx", best)))
        worse, better = ("below", "above") if metric.better == "higher" else ("above", "below")
        return GateResult(
            metric.key, f"at most {metric.amount(gate.limit)} {worse} parent {best}",
            f"{metric.amount(abs(drop))} {worse if drop > 0 else better}", drop <= gate.limit,
            max(0.0, drop - gate.limit),
        )  # fmt: skip
    if gate.metric == "params":
        *planned, child = m.plan.models
        ratio = child.params / next(p.params for p in planned if p.name == best)
        return GateResult(
            "params", f"at most {gate.limit:g} of parent {best}'s", f"{ratio:.3f}",
            ratio <= gate.limit, max(0.0, ratio / gate.limit - 1),
        )  # fmt: skip
    conditions = {(s.threads, s.batch) for s in speedups}
    batch = min(b for _, b in conditions)
    threads = max(t for t, b in conditions if b == batch)
    found = next(
        s for s in speedups
        if (s.base, s.other, s.threads, s.batch) == (best, "onnx", threads, batch)
    )  # fmt: skip
    return GateResult(
        "latency_p50",
        f"onnx at least {gate.limit:g}× faster than parent {best} at batch {batch}, "
        f"{threads} thread{'s' * (threads > 1)}",
        f"{found.ratio:.2f}× ({found.low:.2f} – {found.high:.2f})",
        found.ratio >= gate.limit,
        max(0.0, 1 - found.ratio / gate.limit),
    )


def _warnings(m: Measurements, latencies: list[dict[str, Any]]) -> list[str]:
    out = []
    noisy = sorted({entry["name"] for entry in latencies if entry["noisy"]})
    if noisy:
        out.append(f"the machine was busy while timing {', '.join(noisy)}: measure again")
    if m.sparse is not None:
        out.append(STATEMENT)
    told = m.job.licences
    out += [*told.conflicts, *told.inherited]
    names = m.job.recipe.fuse.parents or [p.name for p in m.job.parents]
    known = {i for p in m.job.parents if p.name in names for i in p.places}
    if m.job.task.by_class and len(known) < len(m.job.data.classes):
        out.append(
            f"the fused parents know {len(known)} of {len(m.job.data.classes)} classes: the others "
            "can come from finetuning only"
        )
    if m.int8_dropped:
        metric = m.job.task.metric
        drop = metric.loss(*(m.measured[r][metric.key].value for r in ("onnx-int8", "onnx")))
        out.append(
            f"INT8 loses {metric.amount(drop)} of {metric.key}, more than max_drop: not shipped "
            "(decided on the test set)"
        )
    samples = min(m.job.recipe.data.calibration.samples, len(m.job.data.train))
    refits = m.job.recipe.fuse.method == "refit"
    width = m.job.family.shape(m.job.target).hidden_size if refits else 0
    if m.job.task.by_class and samples < 2 * width:
        out.append(
            f"only {samples} calibration samples for a width of {width}: the head's refit leans "
            "on its prior"
        )
    fusion = load_fusion(m.fused.path)
    plan, maps = fusion.get("plan"), fusion.get("maps", [])
    soft = m.job.recipe.fuse.ot.solver in ("sinkhorn", "unbalanced")
    hint = ": raise fuse.ot.reg or effective_units" if soft else ""
    if plan is not None and not plan["converged"]:
        out.append(f"the transport plan of the stream did not converge{hint}")
    loose = sum(not one["converged"] for one in maps)
    if loose:
        out.append(f"{loose} of {len(maps)} transport maps did not converge{hint}")
    return out
