"""The report's pictures: what the fusion did, how training went, where the child errs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.fusion_record import load_fusion, part_name
from slimfuse.pipeline.job import Job
from slimfuse.report import Picture
from slimfuse.store import Stage
from slimfuse.tasks import Evidence

SMOOTHING = 25  # steps that one point of the loss curve averages
MOST_CLASSES = 40  # that a picture can show
CHOSEN = {"query": "heads", "MLP in": "MLP units"}
"""What is chosen with a part."""


def pictures(
    job: BaseJob,
    fused: Stage,
    trained: Mapping[str, Stage],
    best: str,
    evidence: Mapping[str, Evidence],
) -> list[Picture]:
    """Return the report's pictures.

    trained: finetuned stages by the name of their start; best: the better parent; evidence: what
    the parents, and as `finetuned` the child that is shipped, say of the test set.
    """
    fusion = load_fusion(fused.path)
    found = []
    if "energy" in fusion:
        assert isinstance(job, Job), "only families are refitted"
        found += _stream_pictures(job, fusion) + _part_pictures(fusion)
        found += _saliency_pictures(fusion, job.recipe.fuse.saliency or "energy")
    if fusion.get("alignment"):
        found += _alignment_pictures(fusion)
    if "maps" in fusion:
        found += _map_pictures(fusion)
    return found + _training_pictures(trained) + _error_pictures(job, best, evidence)


def _alignment_pictures(fusion: dict[str, Any]) -> list[Picture]:
    first, *others = fusion["averaged"]
    series = {
        f"{label} of {name}": {"x": list(range(len(one[key]))), "y": one[key]}
        for name, one in zip(others, fusion["alignment"], strict=True)
        for key, label in (("heads", "heads"), ("units", "MLP units"))
    }
    streams = "; ".join(
        f"{name} {one['stream']:.2f}" for name, one in zip(others, fusion["alignment"], strict=True)
    )
    return [
        Picture(
            f"Agreement with {first} after alignment",
            f"Mean correlation of matched parts; of the streams: {streams}. What agrees little is "
            "averaged away. Measured on the calibration samples.",
            f"Mean correlation of {', '.join(series)} over layers.",
            "lines",
            {"series": series, "xlabel": "layer", "ylabel": "mean correlation"},
            "alignment",
        )
    ]


def _map_pictures(fusion: dict[str, Any]) -> list[Picture]:
    kinds: dict[str, list[float]] = {}
    for one in fusion["maps"]:
        kinds.setdefault(str(one["name"]).split(".")[0], []).append(one["effective_units"])
    labels, values = list(kinds), [float(np.mean(v)) for v in kinds.values()]
    shares = ", ".join(f"{w:.0%}" for w in fusion["weights"])
    return [
        Picture(
            "How many of a parent's units go into one of the anchor's",
            f"1 is a hard match. The anchor and the parents count {shares} in the average.",
            "; ".join(f"{k} {v:.1f}" for k, v in zip(labels, values, strict=True)),
            "bars",
            {"labels": labels, "values": values, "ylabel": "effective units"},
            "transport",
        )
    ]


def _stream_pictures(job: Job, fusion: dict[str, Any]) -> list[Picture]:
    energy = np.cumsum(fusion["energy"])
    width = job.family.shape(job.target).hidden_size
    kept = float(fusion["kept"])
    method = job.recipe.fuse.stream
    pictures = [
        Picture(
            "Energy of the residual stream",
            f"The {method} map to {width} channels keeps {kept:.1%} of the parents' common stream; "
            f"{_width_for(energy, 0.99)} directions hold 99 %. Measured on the calibration "
            "samples.",
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
                "Measured on the calibration samples.",
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
        line = series.setdefault(part_name(part), {"x": [], "y": []})
        line["x"].append(part["layer"])
        line["y"].append(part["error"])
    worst = max(fusion["parts"], key=lambda p: p["error"])
    errors = fusion["stream_errors"]
    parents = fusion["parents"]
    masses: dict[str, dict[str, list[float]]] = {}
    for part in fusion["parts"]:
        label = CHOSEN.get(part_name(part))
        if label and part["sources"]:
            counts = Counter(name for name, *_ in part["sources"])
            for name in parents:
                line = masses.setdefault(f"{label} from {name}", {"x": [], "y": []})
                line["x"].append(part["layer"])
                line["y"].append(counts[name] / len(part["sources"]))
    pictures = [
        Picture(
            "What each refitted part misses",
            f"Largest: {part_name(worst)} of layer {worst['layer']}, "
            f"{worst['error']:.1%} of its goal's variance. Measured on the calibration samples.",
            f"Refit error over {len(layers)} layers, one line a part.",
            "lines",
            {"series": {k: v for k, v in series.items() if len(v["x"]) > 1} or series,
             "xlabel": "layer", "ylabel": "share of variance missed"},
            "refit",
        ),
        Picture(
            "Error of the stream with depth",
            f"The narrow stream ends {errors[-1]:.1%} off the parents' common one; a rising line "
            "would mean that errors pile up. Measured on the calibration samples.",
            "Line of the stream's error after each attention and MLP.",
            "lines",
            {"series": {"stream": {"x": list(range(1, len(errors) + 1)), "y": errors}},
             "xlabel": "sublayer", "ylabel": "share of variance missed"},
            "refit",
        ),
    ]  # fmt: skip
    if len(parents) > 1 and masses:
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


def _saliency_pictures(fusion: dict[str, Any], kind: str) -> list[Picture]:
    """Return how much of the saliency stayed, where heads and units were chosen by it."""
    series: dict[str, dict[str, list[float]]] = {}
    for part in fusion["parts"]:
        label, share = CHOSEN.get(part_name(part)), part.get("saliency")
        if label and share is not None:
            line = series.setdefault(label, {"x": [], "y": []})
            line["x"].append(part["layer"])
            line["y"].append(100 * share)
    if not series:
        return []
    least = [(y, name, x) for name, s in series.items() for x, y in zip(*s.values(), strict=True)]
    share, name, layer = min(least)
    return [
        Picture(
            "Saliency that the kept heads and units hold",
            f"By {kind}, of all that the parents have in a layer. Least: {name} of layer "
            f"{layer:.0f}, {share:.1f} %; where little is held a wider target would help.",
            f"Share of the saliency kept, by layer, of {' and '.join(series)}.",
            "lines",
            {"series": series, "xlabel": "layer", "ylabel": "saliency kept, %"},
            "refit",
        )
    ]


def losses_of(trained: Mapping[str, Stage]) -> dict[str, dict[str, list[float]]]:
    """Return the smoothed losses of trainings by name, as series of a picture; none of no steps."""
    series = {}
    for name, stage in trained.items():
        losses = np.asarray(json.loads((stage.path / "losses.json").read_text()), dtype=float)
        window = max(1, min(SMOOTHING, len(losses) // 10))
        count = len(losses) // window
        if count:
            means = np.nanmean(losses[: count * window].reshape(count, window), axis=1)
            steps = (np.arange(count) + 1) * window
            series[name] = {"x": steps.tolist(), "y": means.tolist()}
    return series


def _training_pictures(trained: Mapping[str, Stage]) -> list[Picture]:
    series = losses_of(trained)
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


def _error_pictures(job: BaseJob, best: str, evidence: Mapping[str, Evidence]) -> list[Picture]:
    labels, classes = job.data.test.labels, job.data.classes
    if not job.task.by_class or len(classes) > MOST_CLASSES:
        return []

    def per_class(name: str) -> np.ndarray[Any, Any]:
        right = evidence[name]["logits"].argmax(1).numpy() == labels
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
