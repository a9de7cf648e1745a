"""The quantised ONNX file: made as the recipe asks, judged by the task's metric, mended or left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.deployment import Deployment
from slimfuse.pipeline.stages import Figures
from slimfuse.report import Tried
from slimfuse.store import Stage

ROW, FILE = "onnx-int8", "model_quantized.onnx"
KINDS = {"dynamic": "dynamic INT8", "static": "static INT8", "int4": "4-bit weights"}


@dataclass(frozen=True)
class QuantizedFile:
    """A quantised file, whether it is good enough to ship, and all that were tried for it."""

    stage: Stage
    shipped: bool
    tried: tuple[Tried, ...]


def quantise(
    deployment: Deployment,
    exported: Stage,
    child: Stage,
    measured: dict[str, Figures],
    *,
    batch: int,
    say: Callable[[str, Figures], None],
) -> QuantizedFile | None:
    """Return the quantised file of an export; its figures are added to `measured`.

    Where it loses more than `max_drop`, products go back to float, the dearest first, until it
    doesn't; where that doesn't help, the plain file is measured but not shipped. Mode `dynamic`
    ships whatever it loses; None for mode `none`.
    """
    job, stages = deployment.job, deployment.stages
    quantize = job.recipe.export.quantize
    if quantize.mode == "none":
        return None
    mode, reason = deployment.mode

    def judged(stage: Stage) -> tuple[Figures, float]:
        found = stages.figures(deployment.evidence(stage, FILE, child.path, batch=batch))
        return found, quantisation_loss(job, {**measured, ROW: found})

    plain = deployment.quantised(exported)
    figures, loss = judged(plain)
    say("ONNX INT8" if mode != "int4" else "ONNX 4 bits", figures)
    stage, fine = plain, loss <= quantize.max_drop or quantize.mode == "dynamic"
    tried = [_tried(job, mode, 0, loss, fine, reason)]
    if not fine:
        for kept, mixed in deployment.mixed(exported, plain, child.path):
            found, loss = judged(mixed)
            say(f"with {len(kept)} products in float32", found)
            good = loss <= quantize.max_drop
            tried.append(_tried(job, mode, len(kept), loss, good, "the dearest stay float32"))
            if good:
                stage, figures, fine = mixed, found, True
                break
    measured[ROW] = figures
    return QuantizedFile(stage, fine, tuple(tried))


def quantisation_loss(job: BaseJob, measured: Mapping[str, Figures]) -> float:
    """Return how much worse the quantised file is than the ONNX file, see `Metric.loss`."""
    metric = job.task.metric
    got, base = (measured[row][metric.key].value for row in (ROW, "onnx"))
    return metric.loss(got, base)


def _tried(job: BaseJob, mode: str, kept: int, loss: float, good: bool, reason: str) -> Tried:
    metric = job.task.metric
    name = KINDS[mode] + f", {kept} products float32" * bool(kept)
    verb = "gains" if loss < 0 else "loses"
    figure = f"{verb} {metric.amount(abs(loss))} of {metric.key}"
    return Tried("onnx/model_quantized.onnx", name, "kept" if good else "lost", figure, reason)
