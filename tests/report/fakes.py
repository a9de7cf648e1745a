"""A report of made-up figures, with a picture of every kind."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from slimfuse.report import (
    Candidate,
    Example,
    Figure,
    Finding,
    GateResult,
    Latency,
    Picture,
    Report,
    Row,
    Speedup,
    SweepReport,
)

CONDITIONS = ((1, 1), (2, 1), (1, 8), (2, 8))  # (threads, batch)


def share(value: float, n: int = 10_000) -> Figure:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return Figure(value, "", n, value - half, value + half)


def latencies(p50: float, **noise: bool) -> tuple[Latency, ...]:
    factors = {(1, 1): 1.0, (2, 1): 0.57, (1, 8): 7.3, (2, 8): 4.1}
    return tuple(
        Latency(t, b, p50 * k, p50 * k * 1.08, p50 * k * 1.31, 412, p50_low_ms=p50 * k * 0.995,
                p50_high_ms=p50 * k * 1.01, **noise)
        for (t, b), k in factors.items()
    )  # fmt: skip


def without_intervals(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return rows as reports had them before the intervals of latencies were kept."""
    return tuple(
        dataclasses.replace(
            row,
            latency=tuple(
                dataclasses.replace(x, p50_low_ms=None, p50_high_ms=None) for x in row.latency
            ),
        )
        for row in rows
    )


def fake_rows() -> tuple[Row, ...]:
    def loss(value: float) -> Figure:
        return Figure(value, "nat", 10_000, value - 0.011, value + 0.011)

    def row(name: str, stage: str, acc: float, nll: float, shape: tuple[int, int], **more) -> Row:
        params, size = shape
        metrics = {"log_loss": loss(nll), "accuracy": share(acc)}
        return Row(name, stage, metrics, params, params * 98, size, **more)  # type: ignore[arg-type]

    big, small = (4_312_074, 17_248_296), (1_197_834, 4_791_336)
    return (
        row("vit-a", "parent", 0.8842, 0.331, big, latency=latencies(11.83)),
        row("vit-b", "parent", 0.8813, 0.338, big, latency=latencies(11.91)),
        row("fused", "fused", 0.7127, 0.842, small, note="one shot, no training"),
        row("64 wide child", "finetuned", 0.8791, 0.345, small),
        row(
            "child.onnx",
            "onnx",
            0.8791,
            0.345,
            small,
            latency=latencies(5.61),
            parity_max_abs=2.1e-6,
        ),
        row(
            "child-int8.onnx",
            "onnx-int8",
            0.8783,
            0.347,
            (1_197_834, 1_402_112),
            latency=latencies(3.92, noisy=True),
            parity_max_abs=0.083,
        ),
        row("from scratch", "baseline", 0.8615, 0.391, small, latency=latencies(5.64)),
    )


def fake_pictures(count: int) -> tuple[Picture, ...]:
    rng = np.random.default_rng(7)
    plan = np.zeros((128, 64))
    plan[np.arange(128), rng.permutation(128) // 2] = 1 / 128
    steps = np.arange(1, 1174)
    kinds = [
        Picture(
            "Transport plan, residual stream",
            "Nearly one to one: the parents' units pair up, little is averaged.",
            "A 128 by 64 plan with one bright cell per row.",
            "heatmap",
            {
                "matrix": plan[np.argsort(plan.argmax(1))],
                "xlabel": "child unit",
                "ylabel": "vit-a unit",
            },
        ),
        Picture(
            "Correlation of heads",
            "Heads of layer 3 find no partner: there the fusion loses most.",
            "Matrix of correlations, strong on the diagonal but for its middle.",
            "heatmap",
            {
                "matrix": np.tanh(rng.normal(size=(12, 9)) + 2 * np.eye(12, 9)),
                "xlabel": "head of vit-b",
                "ylabel": "head of vit-a",
            },
        ),
        Picture(
            "Training loss",
            "The fused start is ahead of the random one by two epochs and stays there.",
            "Two falling curves; the fused one lies lower throughout.",
            "lines",
            {
                "series": {
                    "from fused": {"x": steps, "y": 0.35 + 0.5 * np.exp(-steps / 150)},
                    "from scratch": {
                        "x": steps,
                        "y": 0.39 + 1.9 * np.exp(-steps / 260) + rng.normal(0, 0.02, len(steps)),
                    },
                },
                "xlabel": "step",
                "ylabel": "loss, nat",
            },
            group="finetuning",
        ),
        Picture(
            "Saliency kept per layer",
            "The last layers lose most: a deeper but narrower target would help.",
            "Bars falling from 0.98 at layer 0 to 0.61 at layer 5.",
            "bars",
            {
                "labels": [f"encoder layer {i}" for i in range(6)],
                "values": [0.98, 0.95, 0.9, 0.84, 0.72, 0.61],
                "ylabel": "share of saliency kept",
            },
        ),
    ]
    return tuple(
        dataclasses.replace(kinds[i % 4], title=f"{kinds[i % 4].title} {i // 4 + 1}")
        for i in range(count)
    )


def fake_report(pictures: int | tuple[Picture, ...] = 4, **changes: object) -> Report:
    rows = fake_rows()
    timed = [r for r in rows if r.latency and r.name != "vit-a"]
    speedups = tuple(
        Speedup("vit-a", r.name, t, b, ratio, ratio * 0.97, ratio * 1.04)
        for r in timed
        for t, b in CONDITIONS
        for ratio in [rows[0].at(t, b).p50_ms / r.at(t, b).p50_ms]  # type: ignore[union-attr]
    )
    report = Report(
        name="vit-fashion-half",
        recipe_path="recipes/vit-fashion-half.yaml",
        command="slimfuse compress recipes/vit-fashion-half.yaml --out runs/vit-fashion-half",
        summary="Two ViTs trained on Fashion-MNIST from two seeds, fused to half their width.",
        rows=rows,
        speedups=speedups,
        gates=(
            GateResult("accuracy", "drop ≤ 1.0 pp", "0.5 pp", True),
            GateResult("latency p50", "speed-up ≥ 1.5×", "2.1×", True),
            GateResult("size", "≤ 1.0 MB", "1.4 MB", False),
        ),
        pictures=fake_pictures(pictures) if isinstance(pictures, int) else pictures,
        settings={
            "version": 1,
            "family": "vit",
            "parents": [{"name": "a", "from": "runs/a"}, {"name": "b", "from": "runs/b"}],
            "target": {"hidden_size": 64, "num_attention_heads": 2, "budget": None},
            "bench": {"threads": [1, 2], "batch": [1, 8], "warmup": 10},
            "fuse": {"method": "refit", "ridge": 1e-3, "ot": {}, "untied": False},
        },
        environment={"python": "3.11.7", "cpu": "AMD EPYC 7B13, 2 cores", "onnxruntime": "1.24.1"},
        timings={"load": 1.2, "calibrate": 14.8, "fuse": 22.4, "finetune": 1473.0, "bench": 96.1},
        warnings=("child-int8.onnx: the machine was noisy while it was timed",),
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def quick_report(**changes: object) -> Report:
    """Return the report with one condition and no pictures: its page draws in a second or two."""
    rows = tuple(
        dataclasses.replace(row, latency=tuple(x for x in [row.at(2, 1)] if x is not None))
        for row in fake_rows()
    )
    speedups = tuple(s for s in fake_report().speedups if (s.threads, s.batch) == (2, 1))
    return fake_report(**{"rows": rows, "speedups": speedups, "pictures": 0, **changes})  # type: ignore[arg-type]


def fake_finding() -> Finding:
    return Finding(
        "Errors of the parent and of the child", "10 000 test samples.",
        ("samples", "child right", "child wrong"), (("parent right", "8 700", "142"),),
        "The child errs on 1 209 samples.", "errors",
    )  # fmt: skip


def fake_example() -> Example:
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5E"
    pixel += "rkJggg=="
    return Example(
        17,
        "boot",
        "boot (97%)",
        "sandal (61%)",
        "new error",
        image=f"data:image/png;base64,{pixel}",
    )


def fake_sweep() -> SweepReport:
    parent, *_ = fake_rows()
    child = dataclasses.replace(fake_rows()[4], name="onnx")
    speedup = Speedup("vit-a", "onnx", 2, 1, 2.0, 1.9, 2.1)
    made = (Candidate("half", "candidates/half", ("target.hidden_size=0.5",), "64 wide",
                      (child, fake_rows()[6]), (), speedup, True),)  # fmt: skip
    return SweepReport(
        "sweep", "r.yaml", "slimfuse sweep r.yaml", "1 candidate", "accuracy", 2, 1,
        (parent,), "vit-a", made, "half", "the only candidate",
    )  # fmt: skip
