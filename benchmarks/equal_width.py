"""Equal-width fusion of two independent ViTs, one-shot (`make bench-equal-width`).

Every alignment beside the controls; and the refit over the number of calibration images, with the
ridge found by leaving out against fixed ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import machine, settle, write
from torch import Tensor, nn
from zoo import fashion

from slimfuse.data import load_fashion_mnist
from slimfuse.families import FAMILIES
from slimfuse.fuse.gauge import aligned, average
from slimfuse.fuse.importance import all_depths_importance
from slimfuse.fuse.repair import repair
from slimfuse.fuse.union import Parent
from slimfuse.tasks import ImageClassification, accuracy, answers_of, ask
from slimfuse.tasks.image_classification import PIXELS, Pixels, make_processor

PAIRS = (0, 1, 2)
TEST, CALIBRATION = 5000, 512
COUNTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
FIXED = (1e-6, 1e-3)
FAMILY = FAMILIES["vit"]
TASK = ImageClassification()
Batches = Callable[[], Iterable[Tensor]]


def pair(seed: int, out: Path) -> dict[str, float]:
    """Return the accuracies of one pair, in per cent, from the file or measured now."""
    file = out / f"pair-{seed}.json"
    if file.exists():
        found: dict[str, float] = json.loads(file.read_text())
        return found
    data = load_fashion_mnist()
    processor = make_processor(data.image_size, data.mean, data.std)
    test = data.test.sample(TEST, 0)
    pixels, labels = Pixels(test, processor), test.labels
    drawn = Pixels(data.train.sample(max(COUNTS), seed), processor)
    images = drawn[torch.arange(max(COUNTS))].arguments[PIXELS]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    parents = [Parent("ab"[i], FAMILY.load(fashion(seed, i))) for i in (0, 1)]
    config = parents[0].model.config  # type: ignore[union-attr]
    figures: dict[str, float] = {}

    def given(count: int) -> Batches:
        return lambda: images[:count].split(64)

    def score(name: str, model: nn.Module) -> None:
        said = ask(answers_of(model, TASK.output), TASK, pixels, what=f"measuring {name}")
        scores = said[TASK.answers]
        figures[name] = 100 * accuracy(scores, labels).value
        print(f"pair {seed}, {name}: {figures[name]:.2f}", flush=True)

    def built(**settings: Any) -> nn.Module:
        model = FAMILY.build(config)
        average(parents, model, FAMILY, given(CALIBRATION), **settings)
        return model

    for parent in parents:
        score(f"parent {parent.name}", parent.model)
    layouts = [FAMILY.layout(p.model.config) for p in parents]
    models = [p.model for p in parents]
    importance = all_depths_importance(models, layouts, given(256))
    score("plain average", built(alignment="none"))
    score("permutation OT", built(alignment="permutation", importance=importance))
    score("soft OT, 8 units", built(alignment="soft", importance=importance))
    gauge = built(alignment="gauge", importance=importance)
    score("gauge", gauge)
    references = aligned(parents, FAMILY, given(CALIBRATION), importance)
    state = {name: value.clone() for name, value in gauge.state_dict().items()}

    def refitted(name: str, start: dict[str, Tensor], count: int, ridge: float | None) -> None:
        model = FAMILY.build(config)
        model.load_state_dict(start)
        repair(references, model, FAMILY, given(count), ridge=ridge)
        score(name, model)

    refitted("gauge + refit", state, CALIBRATION, None)
    torch.manual_seed(1000 + seed)
    untrained = FAMILY.build(config).state_dict()
    score("random net", _loaded(config, untrained))
    refitted("random net + refit", untrained, CALIBRATION, None)
    for count in COUNTS:
        refitted(f"refit on {count}, leave-one-out", state, count, None)
        for ridge in FIXED if seed == PAIRS[0] else ():
            refitted(f"refit on {count}, ridge {ridge:g}", state, count, ridge)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures))
    return figures


def _loaded(config: Any, state: dict[str, Tensor]) -> nn.Module:
    model = FAMILY.build(config)
    model.load_state_dict(state)
    return model


def main() -> None:
    """Measure all pairs and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, nargs="*", default=PAIRS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = [pair(seed, Path("runs/bench-equal-width")) for seed in arguments.pairs]
    if len(runs) < len(PAIRS):
        return
    names = list(runs[0])
    lines = [
        "# Equal-width fusion of two independent Fashion-MNIST ViTs, one-shot",
        "",
        f"128 wide, 6 deep; {len(PAIRS)} pairs, {TEST:,} test images (±1 point each), "
        f"{CALIBRATION} unlabelled calibration images unless named. No training. Made by "
        "`make bench-equal-width`.",
        "",
        "| model | mean % | sd | per pair |",
        "| --- | --- | --- | --- |",
    ]
    for name in names:
        values = [r[name] for r in runs if name in r]
        spread = f"{stdev(values):.1f}" if len(values) > 1 else ""
        each = ", ".join(f"{v:.1f}" for v in values)
        lines.append(f"| {name} | {mean(values):.1f} | {spread} | {each} |")
    lines += ["", "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]
    write("equal-width", {"accuracy": runs, "machine": machine()}, "\n".join(lines))

    def column(name: str) -> list[float]:
        return [r[name] for r in runs]

    curve = [column(f"refit on {count}, leave-one-out") for count in COUNTS]
    gauge = column("gauge")
    settle(
        {
            "gauge above permutation OT and soft OT in every pair": all(
                g > max(p, s) for g, p, s in
                zip(gauge, column("permutation OT"), column("soft OT, 8 units"), strict=True)
            ),
            "gauge + refit above random net + refit in every pair": all(
                a > b for a, b in
                zip(column("gauge + refit"), column("random net + refit"), strict=True)
            ),
            "leave-one-out never falls more than a point below the un-refitted model": all(
                v >= g - 1 for values in curve for v, g in zip(values, gauge, strict=True)
            ),
            "leave-one-out has no peak: more images never cost more than 1.5 points": all(
                b >= a - 1.5 for few, more in pairwise(curve)
                for a, b in zip(few, more, strict=True)
            ),
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
