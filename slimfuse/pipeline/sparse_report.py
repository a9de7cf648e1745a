"""What the report says of a sparse child: rows, zeros by layer, files' sizes, pictures, notes."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.deployment import Deployment
from slimfuse.pipeline.pictures import losses_of
from slimfuse.pipeline.sparse import Sparse, Thinned, fisher_of, recovery_steps
from slimfuse.progress import track
from slimfuse.report import FileSize, LayerZeros, Picture
from slimfuse.saliency.weight_scores import WEIGHT_SCORERS
from slimfuse.store import Stage

STATEMENT = (
    "onnxruntime computes zeros like any other number: unstructured (and N:M) zeros make files "
    "smaller when compressed, not inference faster"
)
ONNX, INT8 = "model.onnx", "model_quantized.onnx"
LEVEL = 6  # of zlib, its default and gzip's
CHUNK = 1 << 20


@dataclass(frozen=True)
class SparseFiles:
    """The dense child's ONNX file with its parity, and how large both children's files are."""

    dense: Stage
    parity: float
    sizes: tuple[FileSize, ...]


def measure_files(
    deployment: Deployment, dense: Stage, exported: Stage, int8: Stage | None
) -> SparseFiles:
    """Return the files of a dense child beside those of the sparse one (`exported`, `int8`)."""
    onnx, parity = deployment.export("finetuned", dense.path, dense.key)
    files = [("dense", onnx, ONNX), ("sparse", exported, ONNX)]
    if int8 is not None:
        files += [("dense", deployment.quantised(onnx, "int8-finetuned"), INT8)]
        files += [("sparse", int8, INT8)]

    def build(folder: Path) -> None:
        found = []
        with track("compressing files", len(files)) as tell:
            for done, (model, stage, name) in enumerate(files, start=1):
                path = stage.path / name
                found.append([model, name, path.stat().st_size, compressed_bytes(path)])
                tell(done)
        (folder / "sizes.json").write_text(json.dumps(found))

    made = deployment.store.stage("sizes", {"files": [[m, s.key, n] for m, s, n in files]}, build)
    sizes = json.loads((made.path / "sizes.json").read_text())
    return SparseFiles(onnx, parity, tuple(FileSize(*size) for size in sizes))


def compressed_bytes(path: Path) -> int:
    """Return the bytes that zlib makes of a file at its default level; gzip adds 18."""
    squeeze, total = zlib.compressobj(LEVEL), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total += len(squeeze.compress(chunk))
    return total + len(squeeze.flush())


def zeros_note(job: BaseJob, sparse: Sparse, made: Thinned) -> str:
    """Return what a row of the report says of how it was made."""
    metric, told = job.task.metric, [how(job, made)]
    if made is not sparse.child:
        told.insert(0, "control, otherwise made in the same way")
    if made.row in sparse.before:
        value = metric.amount(sparse.before[made.row][metric.key].value)
        told.append(f"{value} before recovery")
    return "; ".join(told)


def how(job: BaseJob, made: Thinned) -> str:
    """Return how many zeros there are, and what chose them."""
    spec = job.recipe.sparsify
    assert spec is not None
    kind = "" if spec.pattern == "unstructured" else f" ({spec.pattern})"
    told = f"{made.record['sparsity']:.1%} zeros{kind} by {made.scorer}"
    if made.record["gradients"]:
        told += f", {made.record['gradients']} gradients"
        if fisher_of(spec, job.task) == "own-answers":
            told += " of own answers"
    if spec.steps > 1:
        told += f", {spec.steps} steps"
    recovery = recovery_steps(job, spec)
    return f"{told}, {recovery} steps of recovery" if recovery else f"{told}, no recovery"


def layers(made: Thinned) -> tuple[LayerZeros, ...]:
    """Return what became of every layer."""
    return tuple(
        LayerZeros(
            one["name"], tuple(one["shape"]), one["weights"], one["weights"] - one["kept"],
            one["increase"],
        )
        for one in made.record["layers"]
    )  # fmt: skip


def card(job: BaseJob, sparse: Sparse) -> str:
    """Return the model card's sentence."""
    count = len(sparse.child.record["layers"])
    return f"Pruned in {count} layers: {how(job, sparse.child)}. Mind that {STATEMENT}."


def sparse_pictures(sparse: Sparse) -> list[Picture]:
    """Return where the zeros are, what they were expected to cost, and how training went on."""
    found = [_zeros_picture(sparse), *_saliency_picture(sparse)]
    if len(sparse.child.record["steps"]) > 1:
        found.append(_steps_picture(sparse))
    series = losses_of({made.row: made.stage for made in sparse.every})
    if series:
        found.append(
            Picture(
                "Loss while recovering",
                "The same steps, data and teachers; only the choice of the zeros differs. After "
                "the last step of the schedule.",
                f"Falling curves of {', '.join(series)}.",
                "lines",
                {"series": series, "xlabel": "step", "ylabel": "distillation loss"},
                "sparsity",
            )
        )
    return found


def _zeros_picture(sparse: Sparse) -> Picture:
    records = sparse.child.record["layers"]
    shares = [1 - one["kept"] / one["weights"] for one in records]
    most, least = int(np.argmax(shares)), int(np.argmin(shares))
    scorer = sparse.child.scorer
    why = "The threshold is one for all layers, so each layer's share is found, not given. "
    if not _found(shares):
        why = "Every layer has the same share. "
    return Picture(
        "Zeros by layer",
        f"{why}Most: {records[most]['name']} ({shares[most]:.1%}); least: "
        f"{records[least]['name']} ({shares[least]:.1%}). Chosen by {scorer} "
        f"({WEIGHT_SCORERS[scorer].source}).",
        f"Shares of zeros of {len(records)} layers, from {shares[least]:.1%} to "
        f"{shares[most]:.1%}.",
        "bars",
        {"labels": short_names([one["name"] for one in records]),
         "values": [100 * share for share in shares], "ylabel": "zeros, %"},
        "sparsity",
    )  # fmt: skip


def _saliency_picture(sparse: Sparse) -> list[Picture]:
    """Return how much of the saliency stayed in every layer, where it says something."""
    made = sparse.child
    records = [one for one in made.record["layers"] if one.get("saliency") is not None]
    if not records or made.scorer == "random":
        return []
    shares = [100 * one["saliency"] for one in records]
    least = int(np.argmin(shares))
    last = " of what the last step began with" * (len(made.record["steps"]) > 1)
    zeros = 100 * (1 - records[least]["kept"] / records[least]["weights"])
    return [
        Picture(
            "Saliency kept by layer",
            f"By {made.scorer}, single weights added up{last}. Least: {records[least]['name']}, "
            f"{shares[least]:.1f} % at {zeros:.1f} % zeros. Beside the zeros: where they cost "
            "little they were cheap.",
            f"Shares of the saliency kept in {len(records)} layers, from {min(shares):.1f} % to "
            f"{max(shares):.1f} %.",
            "bars",
            {"labels": short_names([one["name"] for one in records]), "values": shares,
             "ylabel": "saliency kept, %"},
            "sparsity",
        )
    ]  # fmt: skip


def _found(shares: Sequence[float]) -> bool:
    """Whether layers differ by more than rounding to whole weights makes."""
    return max(shares) - min(shares) > 0.01


def _steps_picture(sparse: Sparse) -> Picture:
    steps = {made.row: made.record["steps"] for made in sparse.every}
    final = sparse.child.record["steps"][-1]["sparsity"]
    return Picture(
        "Zeros by step",
        "The cubic schedule takes most at first, when there is most to spare.",
        f"Shares of zeros rising to {final:.1%} in {len(steps['sparse'])} steps.",
        "lines",
        {
            "series": {
                "zeros": {
                    "x": [one["step"] for one in steps["sparse"]],
                    "y": [100 * one["sparsity"] for one in steps["sparse"]],
                }
            },
            "xlabel": "step", "ylabel": "zeros, %",
        },
        "sparsity",
    )  # fmt: skip


def short_names(names: Sequence[str]) -> list[str]:
    """Return parameters' names without the words of most of them that they can do without."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return list(names)
    found = Counter(word for part in parts for word in set(part) if not word.isdecimal())
    usual = dict.fromkeys(word for part in parts for word in (part[-1], *part))
    for word in sorted(usual, key=lambda one: -found[one]):
        cut = [[one for one in part if one != word] for part in parts]
        told = all("".join(part).strip("0123456789") for part in cut)  # a number alone says little
        if told and 2 * found[word] > len(parts) == len({tuple(part) for part in cut}):
            parts = cut
    return [".".join(part) for part in parts]
