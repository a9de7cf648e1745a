"""OT fusion of MLPs and VGG11-style nets on Fashion-MNIST (`make bench-nets`).

Singh & Jaggi (arXiv 1910.05653) report one-shot 86 % by OT against 17 % by plain averaging for
VGG11 on CIFAR10.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common import machine, settle, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from slimfuse.data import load_fashion_mnist
from slimfuse.finetune.loop import best_precision, fit
from slimfuse.finetune.schedule import Schedule, steps_of
from slimfuse.nets import (
    Config,
    MLPConfig,
    VGGConfig,
    build,
    fuse_nets,
    load,
    narrow,
    save,
    vanilla,
)  # fmt: skip
from slimfuse.nets.fusion import CostKind
from slimfuse.tasks import Measured, accuracy
from slimfuse.transport import Solver

ZOO = Path("runs/zoo")
TRAIN_IMAGES, TEST_IMAGES, CALIBRATION, BATCH = 60_000, 10_000, 400, 128
SEEDS = 3
SOLVERS = {
    "EMD": Solver(),
    "Sinkhorn 0.02": Solver(kind="sinkhorn", reg=0.02),
    "Sinkhorn 0.1": Solver(kind="sinkhorn", reg=0.1),
}
COSTS: tuple[CostKind, ...] = ("activations", "weights")
SOFT = "Sinkhorn 0.02"
VANILLA, OT = "a + b, plain average", "a + b, OT (EMD, activations)"
VANILLA_FOUR, OT_FOUR = "four parents, plain average", "four parents, OT (EMD, activations)"
RANDOM = "a + random-weight net, OT (EMD, activations)"


@dataclass(frozen=True)
class Case:
    """An architecture, the epochs that its nets are trained for, and how many full ones there are.

    With six the pairs are disjoint; with four each shares a net with the next (a cheaper bench).
    """

    name: str
    config: Config
    epochs: float
    pool: int

    def parents(self, seed: int) -> list[nn.Module]:
        """Return the four parents of a seed; the first two are its pair."""
        first = seed * (2 if self.pool >= 2 * SEEDS else 1)
        return [trained(self, (first + i) % self.pool) for i in range(4)]

    @property
    def half(self) -> Config:
        """The same net at half width."""
        return narrow(self.config, 0.5)


CASES = {
    "mlp": Case("mlp", MLPConfig(784, (400, 200, 100), 10), 3, 6),
    "vgg": Case("vgg", narrow(VGGConfig(channels=1), 0.25), 1, 4),
}


@dataclass(frozen=True)
class Cell:
    """An accuracy, and for a fusion how many of a parent's units make a target unit (the mean)."""

    accuracy: Measured
    units: float | None = None


@cache
def images(part: str) -> tuple[Tensor, Tensor]:
    """Return standardised grey images (n, 1, 28, 28) and labels (n,) of `train` or `test`."""
    data = load_fashion_mnist()
    split = getattr(data, part)
    grey = torch.stack([torch.from_numpy(image[..., 0].copy()) for image in split.items])
    pixels = (grey[:, None].float() / 255 - data.mean[0]) / data.std[0]
    return pixels, torch.from_numpy(split.labels.copy())


def trained(case: Case, seed: int, *, half: bool = False) -> nn.Module:
    """Return a net, training it where it isn't kept yet."""
    folder = ZOO / f"nets-{case.name}{'-half' * half}-{seed}"
    config = case.half if half else case.config
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(seed + 1000 * half)
        net = build(config)
        x, y = images("train")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint.safetensors"
        fit(
            net,
            lambda model, i: cross_entropy(model(x[i]).float(), y[i]),
            len(x),
            Schedule(steps_of(len(x), case.epochs, BATCH), BATCH, 1e-3, seed=seed + 1000 * half),
            precision=best_precision(),
            checkpoint=checkpoint,
            what=f"training {folder.name}",
        )
        save(net, config, folder)
        checkpoint.unlink()
    return load(folder)


@torch.no_grad()
def tested(net: nn.Module, units: float | None = None) -> Cell:
    """Return the accuracy on the 10 000 test images."""
    x, y = images("test")
    scores = torch.cat([net.eval()(part) for part in x.split(500)])
    return Cell(accuracy(scores, y.numpy()), units)


def calibration() -> list[Tensor]:
    """Return unlabelled training images in batches of 100."""
    return list(images("train")[0][:CALIBRATION].split(100))


def fused(parents: Sequence[nn.Module], anchor: nn.Module | None = None, **options: Any) -> Cell:
    """Return the one-shot accuracy of an OT fusion."""
    target = copy.deepcopy(parents[0] if anchor is None else anchor)
    result = fuse_nets(parents, anchor, target, calibration(), **options)
    return tested(target, mean(m.effective_units for maps in result.maps for m in maps.values()))


def averaged(parents: Sequence[nn.Module]) -> Cell:
    """Return the one-shot accuracy of the plain average."""
    target = copy.deepcopy(parents[0])
    vanilla(parents, target)
    return tested(target)


def pruned(net: nn.Module) -> nn.Module:
    """Return a net without the half of every space with the least L1 norm (torch-pruning)."""
    import torch_pruning as tp

    slim = copy.deepcopy(net)
    last = [m for m in slim.modules() if isinstance(m, nn.Linear)][-1]
    tp.pruner.MagnitudePruner(
        slim, calibration()[0][:2], importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5, ignored_layers=[last], forward_fn=lambda m, x: m(x),
    ).step()  # fmt: skip
    return slim.eval()


def one_seed(case: Case, seed: int) -> dict[str, Cell]:
    """Return every row of the table for one pair of parents (and two more for the four)."""
    four = case.parents(seed)
    a, b = four[:2]
    torch.manual_seed(seed)
    strange, anchor, slim = build(case.config), trained(case, seed, half=True), pruned(a)
    emd: dict[str, Any] = {"solver": SOLVERS["EMD"]}
    table = {"parent a": tested(a), "parent b": tested(b), VANILLA: averaged([a, b])}
    for name, solver in SOLVERS.items():
        for cost in COSTS:
            found = fused([a, b], solver=solver, cost=cost)
            table[f"a + b, OT ({name}, {cost})"] = found
    table |= {
        RANDOM: fused([a, strange], **emd),
        VANILLA_FOUR: averaged(four),
        OT_FOUR: fused(four, **emd),
        "four parents, OT (EMD, weights)": fused(four, cost="weights", **emd),
        f"four parents, OT ({SOFT}, activations)": fused(four, solver=SOLVERS[SOFT]),
        "half-width anchor, trained alone": tested(anchor),
        "a moved to half width by that anchor (EMD, activations)": fused(
            [a], anchor, weights=[1, 0], **emd
        ),
        "a + half-width anchor, OT (EMD, activations)": fused([a], anchor, **emd),
        "a + half-width anchor, OT (EMD, weights)": fused([a], anchor, cost="weights", **emd),
        f"a + half-width anchor, OT ({SOFT}, activations)": fused(
            [a], anchor, solver=SOLVERS[SOFT]
        ),
        "a pruned to half width": tested(slim),
        "pruned a + dense a, OT (EMD, activations)": fused([a], slim, **emd),
        "pruned a + dense a, OT (EMD, weights)": fused([a], slim, cost="weights", **emd),
    }
    return table


def above(high: Sequence[Cell], low: Sequence[Cell]) -> bool:
    """Return whether the 95 % intervals of `high` lie wholly above those of `low`, seed by seed."""
    return all(h.accuracy.low > o.accuracy.high for h, o in zip(high, low, strict=True))


def markdown(results: dict[str, dict[str, list[Cell]]], conditions: dict[str, str]) -> str:
    """Return the tables with their conditions."""
    lines = [
        "# OT fusion of MLPs and VGG11-style nets on Fashion-MNIST, one-shot", "",
        f"{SEEDS} pairs of parents, {TEST_IMAGES} test images (95 % interval at most ±1 point), "
        f"{CALIBRATION} unlabelled training images for the activation cost, no finetuning. "
        "Sinkhorn with its regulariser in units of the mean cost; units: how many of a parent's "
        "units make one of the target's (perplexity, mean). Published for VGG11 on CIFAR10: "
        "OT 86 %, plain average 17 %. Made by `make bench-nets`.",
    ]  # fmt: skip
    for name, table in results.items():
        case = CASES[name]
        lines += [
            "", f"## {name}: widths {', '.join(map(str, case.config.widths))}", "",
            f"Training: {case.epochs} × {TRAIN_IMAGES} images, AdamW, rate 1e-3, batch "
            f"{BATCH}; {case.pool} parents, so that pairs are "
            f"{'disjoint' if case.pool >= 2 * SEEDS else 'overlapping: 0 1, 1 2, 2 3'}. "
            f"Half width: {', '.join(map(str, case.half.widths))}.", "",
            "| model | mean % | sd | per seed | units |", "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for row, cells in table.items():
            values = [100 * c.accuracy.value for c in cells]
            told = ", ".join(f"{v:.1f}" for v in values)
            units = [c.units for c in cells if c.units is not None]
            lines.append(
                f"| {row} | {mean(values):.1f} | {stdev(values):.1f} | {told} | "
                f"{f'{mean(units):.1f}' if units else ''} |"
            )
    machines = "; ".join(f"{k} {v}" for k, v in conditions.items())
    return "\n".join([*lines, "", f"Machine: {machines}"]) + "\n"


def main() -> None:
    """Train what isn't kept yet, fuse, write the tables and check the claims."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    torch.set_num_threads(1)
    results: dict[str, dict[str, list[Cell]]] = {}
    for name in parser.parse_args().cases:
        seeds = [one_seed(CASES[name], seed) for seed in range(SEEDS)]
        results[name] = {row: [s[row] for s in seeds] for row in seeds[0]}
    conditions = machine()
    data = {
        "accuracy": {
            name: {row: [c.accuracy.value for c in cells] for row, cells in table.items()}
            for name, table in results.items()
        },
        "units": {
            name: {r: [c.units for c in cells] for r, cells in table.items() if cells[0].units}
            for name, table in results.items()
        },
        "widths": {n: {"parent": CASES[n].config.widths, "half": CASES[n].half.widths}
                   for n in results},
        "epochs": {name: CASES[name].epochs for name in results},
        "calibration_images": CALIBRATION, "test_images": TEST_IMAGES, "machine": conditions,
    }  # fmt: skip
    write("nets", data, markdown(results, conditions))
    settle(
        {
            f"{name}: {claim}": above(table[high], table[low])
            for name, table in results.items()
            for claim, high, low in (
                ("OT of two parents clearly above their plain average", OT, VANILLA),
                ("OT of four parents clearly above their plain average", OT_FOUR, VANILLA_FOUR),
                ("OT of two parents clearly above OT with a random-weight net", OT, RANDOM),
            )
        }
    )


if __name__ == "__main__":
    main()
