"""The training loop beside a bare one by hand, on the same model and samples (`make bench-loop`).

Both make the same steps: AdamW with two groups, warm-up and cosine, clipping, distillation from
kept answers. The bare loop writes no checkpoint, shows no bar and can't go on. Rounds take turns,
so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, write
from torch import Tensor, nn
from torch.nn import functional as f

from slimfuse.families import ViT
from slimfuse.finetune.loop import Precision, fit
from slimfuse.finetune.schedule import Schedule, batch_indices, parameter_groups
from slimfuse.pipeline.comparison import interval

SAMPLES, BATCH, CLASSES, TEMPERATURE = 4096, 64, 10, 2.0
LR, DECAY, WARMUP = 5e-4, 0.05, 0.1


def config() -> Any:
    """Return the config of the Fashion-MNIST child."""
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128,
        image_size=28, patch_size=4, num_channels=3, num_labels=CLASSES,
    )  # fmt: skip


class Data:
    """Random pictures with labels and teachers' answers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(SAMPLES, 3, 28, 28, generator=generator)
        self.labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        self.told = torch.randn(SAMPLES, CLASSES, generator=generator).softmax(1)

    def loss(self, model: nn.Module, indices: Tensor) -> Tensor:
        """Return what both loops minimise."""
        rows = model(pixel_values=self.pixels[indices]).logits.float()
        soft = f.kl_div((rows / TEMPERATURE).log_softmax(1), self.told[indices],
                        reduction="batchmean")  # fmt: skip
        hard = f.cross_entropy(rows, self.labels[indices])
        return 0.9 * TEMPERATURE**2 * soft + 0.1 * hard


def bare(model: nn.Module, data: Data, steps: int, precision: Precision) -> list[float]:
    """Train as one would by hand."""
    model.eval()  # no dropout, as in the loop
    optimizer = torch.optim.AdamW(parameter_groups(model, DECAY), lr=LR, fused=True)
    losses = []
    for step in range(steps):
        warm = max(1, round(WARMUP * steps))
        done = (step - warm) / max(1, steps - warm)
        factor = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = LR * factor
        indices = batch_indices(SAMPLES, step, BATCH, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = data.loss(model, indices)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def ours(model: nn.Module, data: Data, steps: int, precision: Precision) -> list[float]:
    """Train by the loop."""
    plan = Schedule(steps, BATCH, LR, DECAY, WARMUP, dropout=False)
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            model, data.loss, SAMPLES, plan, precision=precision,
            checkpoint=Path(folder) / "checkpoint.safetensors", what="training",
        ).losses  # fmt: skip


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, precision = Data(), arguments.precision
    seconds: dict[str, list[float]] = {"bare": [], "loop": []}
    losses: dict[str, list[float]] = {}
    for round_ in range(-1, arguments.rounds):  # the first one warms up
        order = [("bare", bare), ("loop", ours)]
        for name, train in order if round_ % 2 else order[::-1]:
            torch.manual_seed(0)
            model = ViT().build(config(), attention="eager")
            begun = time.process_time()
            losses[name] = train(model, data, arguments.steps, precision)
            if round_ >= 0:
                seconds[name].append(time.process_time() - begun)
    same = max(abs(a - b) for a, b in zip(losses["bare"], losses["loop"], strict=True))
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["loop"], strict=True)]
    middle, low, high = interval(ratios, 0)
    half = (high - low) / 2
    images = {n: arguments.steps * BATCH / statistics.mean(t) for n, t in seconds.items()}
    lines = [
        "# The training loop beside a bare one", "",
        "Fashion-MNIST's child (ViT 6 × 64, patch 4), batch "
        f"{BATCH}, {arguments.steps} steps a round, {arguments.rounds} rounds in turns, "
        f"{arguments.threads} thread(s), {precision}, eager attention; CPU seconds of the process. "
        "The loop's time holds accelerate, the bar and one checkpoint a round. Losses of both "
        f"differ by at most {same:.1e}. Made by `make bench-loop`.", "",
        "| | images a CPU second |", "| --- | ---: |",
        *(f"| {n} | {v:.0f} |" for n, v in images.items()), "",
        f"Time of the loop: {middle:.3f} ± {half:.3f} of the bare one's (95 %, Student's t).", "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), "",
    ]  # fmt: skip
    write("loop", {"seconds": seconds, "ratios": ratios, "largest_difference": same,
                   "machine": machine(), "steps": arguments.steps,
                   "precision": precision}, "\n".join(lines))  # fmt: skip
    if not middle <= 1.1:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
