"""From measurements to the report: rows, speed-ups, gates, pictures, warnings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from slimfuse.pipeline.fusion_record import load_fusion
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.planning import Plan
from slimfuse.recipe import Gate
from slimfuse.report import Figure, GateResult, Latency, Picture, Report, Row, Speedup
from slimfuse.store import Stage
from slimfuse.tasks.image_classification import Measured

SMOOTHING = 25  # steps that one point of the loss curve averages
PART_NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention output",
              "fc1": "MLP in", "fc2": "MLP out", "classifier": "head"}  # fmt: skip


@dataclass(frozen=True)
class Measurements:
    """All that a run found out, by row name."""

    job: Job
    plan: Plan
    command: str
    measured: dict[str, Measured]
    parents: dict[str, tuple[Path, str]]
    parity: dict[str, float]
    fused: Stage
    finetuned: Stage
    baselines: dict[str, Stage]
    exported: Stage
    int8: Stage | None
    int8_dropped: bool
    latency: Stage
    lock: dict[str, Any]
    timings: dict[str, float]
    scores: dict[str, Tensor]
    batches: dict[str, int]


def make_report(m: Measurements) -> Report:
    """Return the report of a run."""
    bench = json.loads((m.latency.path / "bench.json").read_text())
    speedups = tuple(
        Speedup(r["base"], r["other"], r["threads"], r["batch"],
                1 / r["value"], 1 / r["high"], 1 / r["low"])
        for r in bench["ratios"]
    )  # fmt: skip
    rows = tuple(_rows(m, bench["latencies"]))
    child = m.plan.models[-1]
    return Report(
        name=m.job.recipe.name,
        recipe_path=str(m.job.path) if not m.job.path.is_absolute() else m.job.path.name,
        command=m.command,
        summary=f"{len(m.parents)} parent{'s' * (len(m.parents) > 1)} on {m.job.data.name}, "
        f"fused into one model {child.shape}",
        rows=rows,
        speedups=speedups,
        gates=tuple(_gate(gate, m, speedups) for gate in m.job.recipe.gates),
        pictures=tuple(_pictures(m)),
        settings=m.lock,
        environment=bench["environment"] | {
            "torch threads": str(m.job.threads), "training precision": m.job.precision,
        },
        timings=m.timings,
        warnings=tuple(_warnings(m, bench["latencies"])),
    )  # fmt: skip


def _rows(m: Measurements, latencies: list[dict[str, Any]]) -> list[Row]:
    *planned, child = m.plan.models
    shapes = {p.name: p for p in planned}

    def timed(name: str) -> tuple[Latency, ...]:
        keys = Latency.__dataclass_fields__
        return tuple(
            Latency(**{k: entry[k] for k in keys}) for entry in latencies if entry["name"] == name
        )

    def figures(name: str) -> dict[str, Figure]:
        x = m.measured[name]
        note = f"test set, at batch {m.batches[name]}" if name in m.batches else "test set"
        return {"accuracy": Figure(x.value, n=x.n, low=x.low, high=x.high, note=note)}

    rows = []
    for name, (folder, _) in m.parents.items():
        p = shapes[name]
        rows.append(
            Row(name, "parent", figures(name), p.params, p.flops, _size(folder), timed(name),
                m.parity[name], "latency of its ONNX file")
        )  # fmt: skip
    for name in ("fused", "finetuned"):
        stage = m.fused if name == "fused" else m.finetuned
        rows.append(
            Row(name, name, figures(name), child.params, child.flops, _size(stage.path))  # type: ignore[arg-type]
        )
    onnx = m.exported.path / "model.onnx"
    rows.append(
        Row("onnx", "onnx", figures("onnx"), child.params, child.flops, onnx.stat().st_size,
            timed("onnx"), m.parity["onnx"])
    )  # fmt: skip
    if m.int8 is not None:
        file = m.int8.path / "model_quantized.onnx"
        note = ""
        if m.int8_dropped:
            note = "not shipped: it loses more than max_drop, decided on the test set"
        elif m.job.recipe.export.quantize.mode == "auto":
            note = "shipped: it loses no more than max_drop, decided on the test set"
        rows.append(
            Row("onnx-int8", "onnx-int8", figures("onnx-int8"), child.params, child.flops,
                file.stat().st_size, timed("onnx-int8"), note=note)
        )  # fmt: skip
    for name, stage in m.baselines.items():
        rows.append(
            Row(name, "baseline", figures(name), child.params, child.flops, _size(stage.path),
                note="same finetuning budget and teachers")
        )  # fmt: skip
    return rows


def _size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def _gate(gate: Gate, m: Measurements, speedups: tuple[Speedup, ...]) -> GateResult:
    best = max(m.parents, key=lambda name: m.measured[name].value)
    if gate.metric == "accuracy":
        drop = m.measured[best].value - m.measured["onnx"].value
        return GateResult(
            "accuracy", f"at most {gate.limit:.2%} below parent {best}",
            f"{abs(drop):.2%} {'below' if drop > 0 else 'above'}", drop <= gate.limit,
        )  # fmt: skip
    if gate.metric == "params":
        *planned, child = m.plan.models
        ratio = child.params / next(p.params for p in planned if p.name == best)
        return GateResult(
            "params", f"at most {gate.limit:g} of parent {best}'s", f"{ratio:.3f}",
            ratio <= gate.limit,
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
    )


def _warnings(m: Measurements, latencies: list[dict[str, Any]]) -> list[str]:
    out = []
    noisy = sorted({entry["name"] for entry in latencies if entry["noisy"]})
    if noisy:
        out.append(f"the machine was busy while timing {', '.join(noisy)}: measure again")
    if m.int8_dropped:
        drop = m.measured["onnx"].value - m.measured["onnx-int8"].value
        out.append(
            f"INT8 loses {drop:.2%} of accuracy, more than max_drop: it was not shipped "
            "(decided on the test set)"
        )
    samples = min(m.job.recipe.data.calibration.samples, len(m.job.data.train))
    width = m.job.family.shape(m.job.target).hidden_size
    if samples < 2 * width:
        out.append(
            f"only {samples} calibration samples for a width of {width}: the head's refit leans "
            "on its prior"
        )
    plan = load_fusion(m.fused.path)["plan"]
    if plan is not None and not plan["converged"]:
        sinkhorn = m.job.recipe.fuse.ot.solver == "sinkhorn"
        hint = ": raise fuse.ot.reg" if sinkhorn else ""
        out.append(f"the transport plan of the stream did not converge{hint}")
    return out


def _pictures(m: Measurements) -> list[Picture]:
    fusion = load_fusion(m.fused.path)
    return [
        *_stream_pictures(m, fusion), *_part_pictures(fusion), *_training_pictures(m),
        *_error_pictures(m),
    ]  # fmt: skip


def _stream_pictures(m: Measurements, fusion: dict[str, Any]) -> list[Picture]:
    energy = np.cumsum(fusion["energy"])
    width = m.job.family.shape(m.job.target).hidden_size
    kept = float(fusion["kept"])
    method = m.job.recipe.fuse.stream
    pictures = [
        Picture(
            "Energy of the residual stream",
            f"The {method} map to {width} channels keeps {kept:.1%} of the parents' common stream; "
            f"{_width_for(energy, 0.99)} directions hold 99 %. Measured on the calibration images.",
            f"Cumulative share of energy over directions, reaching 99 % at "
            f"{_width_for(energy, 0.99)} of {len(energy)}.",
            "lines",
            {
                "series": {
                    "best possible": {"x": list(range(1, len(energy) + 1)), "y": energy.tolist()},
                    f"target width {width}": {"x": [width, width], "y": [0.0, 1.0]},
                },
                "xlabel": "directions", "ylabel": "share of energy",
            },
            "stream",
        ),
        Picture(
            "How the target's channels mix the parents' channels",
            "Each row is one target channel; a single bright cell is a kept channel, "
            "a spread row a mixture.",
            f"Heat map of the stream map, {width} rows by {len(energy)} columns.",
            "heatmap",
            {"matrix": np.abs(np.asarray(fusion["encode"])).tolist(),
             "xlabel": f"channel of {fusion['parents'][0]}", "ylabel": "target channel"},
            "stream",
        ),
    ]  # fmt: skip
    if fusion["plan"] is not None:
        plan = fusion["plan"]
        pictures.append(
            Picture(
                "Transport plan of the stream",
                f"{plan['effective_units']:.1f} parent channels go into a target channel on "
                "average.",
                f"Heat map of the plan, {len(plan['plan'])} by {width}.",
                "heatmap",
                {"matrix": plan["plan"], "xlabel": "target channel", "ylabel": "parent channel"},
                "stream",
            )
        )
    if len(fusion["parents"]) > 1:
        pictures.append(
            Picture(
                "How much of the first parent's stream each parent explains",
                "Parents that explain little have streams of their own: more of them is lost. "
                "Measured on the calibration images.",
                "; ".join(
                    f"{n} {a:.0%}"
                    for n, a in zip(fusion["parents"], fusion["agreement"], strict=True)
                ),
                "bars",
                {"labels": fusion["parents"], "values": fusion["agreement"],
                 "ylabel": "share of energy"},
                "stream",
            )
        )  # fmt: skip
    return pictures


def _width_for(energy: np.ndarray[Any, Any], share: float) -> int:
    return int(np.searchsorted(energy, share)) + 1


def _part_pictures(fusion: dict[str, Any]) -> list[Picture]:
    layers = sorted({p["layer"] for p in fusion["parts"]})
    series: dict[str, dict[str, list[float]]] = {}
    for part in fusion["parts"]:
        line = series.setdefault(PART_NAMES.get(part["part"], part["part"]), {"x": [], "y": []})
        line["x"].append(part["layer"])
        line["y"].append(part["error"])
    worst = max(fusion["parts"], key=lambda p: p["error"])
    errors = fusion["stream_errors"]
    parents = fusion["parents"]
    masses: dict[str, dict[str, list[float]]] = {}
    for kind, label in (("q_proj", "heads"), ("fc1", "MLP units")):
        for part in fusion["parts"]:
            if part["part"] == kind:
                counts = Counter(name for name, _ in part["sources"])
                for name in parents:
                    line = masses.setdefault(f"{label} from {name}", {"x": [], "y": []})
                    line["x"].append(part["layer"])
                    line["y"].append(counts[name] / len(part["sources"]))
    pictures = [
        Picture(
            "What each refitted part misses",
            f"Largest: {PART_NAMES.get(worst['part'], worst['part'])} of layer {worst['layer']}, "
            f"{worst['error']:.1%} of its goal's variance. Measured on the calibration images.",
            f"Refit error over {len(layers)} layers, one line a part.",
            "lines",
            {"series": {k: v for k, v in series.items() if len(v["x"]) > 1},
             "xlabel": "layer", "ylabel": "share of variance missed"},
            "refit",
        ),
        Picture(
            "Error of the stream with depth",
            f"The narrow stream ends {errors[-1]:.1%} off the parents' common one; a rising line "
            "would mean that errors pile up. Measured on the calibration images.",
            "Line of the stream's error after each attention and MLP.",
            "lines",
            {"series": {"stream": {"x": list(range(1, len(errors) + 1)), "y": errors}},
             "xlabel": "sublayer", "ylabel": "share of variance missed"},
            "refit",
        ),
    ]  # fmt: skip
    if len(parents) > 1:
        pictures.append(
            Picture(
                "Where the target's heads and MLP units come from",
                "A parent whose lines stay near 0 gave little to the fused model.",
                "Share of heads and of MLP units taken from each parent, by layer.",
                "lines",
                {"series": masses, "xlabel": "layer", "ylabel": "share of units"},
                "refit",
            )
        )
    return pictures


def _training_pictures(m: Measurements) -> list[Picture]:
    series = {}
    for name, stage in {"fused start": m.finetuned, **m.baselines}.items():
        losses = np.asarray(json.loads((stage.path / "losses.json").read_text()))
        window = max(1, min(SMOOTHING, len(losses) // 10))
        count = len(losses) // window
        if count:
            means = losses[: count * window].reshape(count, window).mean(axis=1)
            steps = (np.arange(count) + 1) * window
            series[name] = {"x": steps.tolist(), "y": means.tolist()}
    if not series:
        return []
    return [
        Picture(
            "Loss while finetuning",
            "The same steps, data and teachers; only the start differs.",
            f"Falling curves of {', '.join(series)}.",
            "lines",
            {"series": series, "xlabel": "step", "ylabel": "distillation loss"},
            "finetuning",
        )
    ]


def _error_pictures(m: Measurements) -> list[Picture]:
    best = max(m.parents, key=lambda name: m.measured[name].value)
    labels, classes = m.job.data.test.labels, m.job.data.classes
    if len(classes) > 40:
        return []

    def per_class(name: str) -> np.ndarray[Any, Any]:
        right = m.scores[name].argmax(1).numpy() == labels
        return np.array(
            [right[labels == c].mean() if (labels == c).any() else 0.0 for c in range(len(classes))]
        )

    change = per_class("finetuned") - per_class(best)
    worst = int(change.argmin())
    return [
        Picture(
            f"Accuracy by class: the child against parent {best}",
            f"It changes most for the worse in {classes[worst]!r}: {change[worst]:+.1%}.",
            "; ".join(f"{c} {d:+.1%}" for c, d in zip(classes, change, strict=True)),
            "bars",
            {"labels": list(classes), "values": change.tolist(), "ylabel": "change of accuracy"},
            "errors",
        )
    ]
