"""Finetuning's throughput: two processes of one thread against one of two (`bench-processes`)."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import machine, write
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.families import Shape, ViT
from slimfuse.finetune.distill import labels_loss
from slimfuse.finetune.loop import Precision, best_precision, fit
from slimfuse.finetune.schedule import Schedule
from slimfuse.pipeline.comparison import interval
from slimfuse.tasks import ImageClassification

CHILD = Shape(64, 4, 128, 6)  # of recipes/vit/fashion-mnist.yaml, with random weights
BATCH, SAMPLES, WARM = 128, 1024, 3
WAYS = {"one process, 2 threads": (1, 2), "two processes, 1 thread each": (2, 1)}


def train(steps: int, threads: int, precision: Precision) -> list[float]:
    """Finetune on random images and return the seconds of each step behind the first few."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    labels = [str(i) for i in range(10)]
    model: nn.Module = ViT().build(
        ViT().new_config(CHILD, patch_size=4, image_size=28, labels=labels), attention="eager"
    )
    pixels, classes = torch.randn(SAMPLES, 3, 28, 28), torch.arange(SAMPLES) % 10
    ends: list[float] = []

    def fetch(indices: Tensor) -> tuple[Batch, Tensor]:
        return Batch({"pixel_values": pixels[indices]}), classes[indices]

    class Told:
        def __call__(self, _step: int, _figures: dict[str, float]) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        fit(
            model, labels_loss(ImageClassification(), fetch), SAMPLES,
            Schedule(steps + WARM, BATCH, dropout=False), precision=precision,
            checkpoint=Path(folder) / "checkpoint", what="training", log=Told(),
        )  # fmt: skip
    return [b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]


def measured(processes: int, threads: int, steps: int, precision: Precision) -> float:
    """Return images a second of one launch: a batch over the mean time of a step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(processes), __file__, "--into", str(file), "--threads", str(threads),
             "--steps", str(steps), "--precision", precision],
            check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return BATCH / mean(json.loads(file.read_text()))


def main() -> None:
    """Measure both in turns, or be one of the processes that are measured (`--into`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=best_precision())
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.into is not None:
        seconds = train(given.steps, given.threads, given.precision)
        if int(os.environ["RANK"]) == 0:
            given.into.write_text(json.dumps(seconds))
        return
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    loads: list[float] = []
    for number in range(given.rounds):
        for name in (list(WAYS), list(WAYS)[::-1])[number % 2]:  # no way is always the first
            loads.append(os.getloadavg()[0])
            found[name].append(measured(*WAYS[name], given.steps, given.precision))
            print(f"round {number + 1}, {name}: {found[name][-1]:.0f} images/s", flush=True)
    report(found, loads, given)


def report(found: dict[str, list[float]], loads: list[float], given: argparse.Namespace) -> None:
    """Write the table."""
    one, two = found.values()
    logs = [math.log(b / a) for a, b in zip(one, two, strict=True)]
    middle, low, high = (math.exp(x) for x in interval(logs, 0))
    conditions = machine() | {
        "rounds": str(given.rounds), "steps a round": str(given.steps),
        "precision": given.precision, "load before a launch": f"{min(loads):.1f}–{max(loads):.1f}",
    }  # fmt: skip
    content: dict[str, Any] = {
        "images_a_second": found, "ratio": [middle, low, high], "conditions": conditions,
    }  # fmt: skip
    lines = [
        "# Finetuning in two processes",
        "",
        f"Images a second of `slimfuse.finetune.loop.fit` at batch {BATCH} (shared by the "
        f"processes): a ViT as `recipes/vit/fashion-mnist.yaml` makes (width 64, depth 6, patch 4, "
        f"28 × 28; random weights and images), AdamW, gradients by DDP (gloo). {given.rounds} "
        f"rounds of one launch each, in turns, {given.steps} steps behind {WARM} that don't count.",
        "",
        "| way | images/s, mean (least … most) |",
        "| --- | --- |",
        *(f"| {name} | {mean(v):.0f} ({min(v):.0f} … {max(v):.0f}) |" for name, v in found.items()),
        "",
        f"Two processes over one, by rounds: {middle:.2f}× (95 % interval {low:.2f} to "
        f"{high:.2f}).",
        "",
        "Conditions: " + "; ".join(f"{k} {v}" for k, v in conditions.items()),
    ]
    write("processes", content, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
