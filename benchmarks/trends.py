"""The diagnostics' trends as small experiments (`make bench-trends`), each a few seconds.

What a child forgets, and the dial against it: `make bench-protect`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf, log
from typing import Any

import torch
from common import machine, settle, write
from plots import Line, Panel, draw
from sklearn.datasets import load_digits
from torch import Tensor, nn

from slimfuse.diagnose.curvature import difference, forecast, measured
from slimfuse.diagnose.hessian import linear_cnn
from slimfuse.diagnose.lipschitz import product_bound, slopes_of
from slimfuse.diagnose.propagation import token_cosine, uniform_cosine
from slimfuse.diagnose.rounding import rounding
from slimfuse.fuse.leave_out import LeaveOut

STRENGTHS = tuple(10.0**k for k in range(-6, 3))
FIXED = 1e-8
TRAIN = 1200
DENSE = 16  # filters up to which a Jacobian is made


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images (n, 64) and labels."""
    found = load_digits()
    x, y = torch.tensor(found.data).float() / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def collapse(seed: int) -> list[dict[str, float]]:
    """Cosine of two tokens behind L layers of uniform attention, branches as they are and /√L."""
    tokens, width, rows = 16, 256, []
    generator = torch.Generator().manual_seed(seed)
    for depth in (1, 2, 4, 8, 16):
        row: dict[str, float] = {"layers": depth}
        for name, alpha in (("plain", 1.0), ("scaled", depth**-0.5)):
            x = torch.linalg.qr(torch.randn(width, tokens, generator=generator)).Q.T * width**0.5
            for _ in range(depth):
                weight = torch.randn(width, width, generator=generator) / width**0.5
                x = x + alpha * x.mean(0) @ weight
            row[name] = float(token_cosine(x[None])[0])
            row[f"{name}, formula"] = uniform_cosine(depth, alpha, 1.0, tokens)
        rows.append(row)
    return rows


def trained(width: int, seed: int, x: Tensor, y: Tensor, steps: int) -> nn.Sequential:
    """Return a net of one hidden layer, trained on all samples at once."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def slopes(seed: int, steps: int = 500) -> list[dict[str, float]]:
    """Both bounds of the Lipschitz constant over width, on 200 images with a tenth wrong labels."""
    x, y, held_out, truth = digits(seed)
    x, y = x[:200], y[:200].clone()
    y[::10] = (y[::10] + 1) % 10
    rows = []
    for width in (2, 4, 8, 16, 32, 64, 128, 256):
        model = trained(width, seed, x, y, steps)
        with torch.no_grad():
            fit = float((model(x).argmax(1) == y).float().mean())
            right = float((model(held_out).argmax(1) == truth).float().mean())
        lower = float(slopes_of(model, x, iterations=20).max())
        rows.append({"width": width, "fit": fit, "test": right, "lower": lower,
                     "upper": product_bound(model)})  # fmt: skip
    return rows


def ranks(_seed: int) -> list[dict[str, float]]:
    """Rank of the Gauss-Newton matrix of linear CNNs over their parameters."""
    rows = []
    for m in (4, 8, 16, 32, 64):
        told = linear_cnn((1, m, m), (3, 3)).outer
        counted = dense_rank(m) if m <= DENSE else -1
        rows.append({"filters": m, "parameters": m * 3 + m * m * 3, "rank": told,
                     "counted": counted})  # fmt: skip
    return rows


def dense_rank(filters: int) -> int:
    """Return the rank of JᵀJ of such a net, counted from its Jacobian on random inputs."""
    generator = torch.Generator().manual_seed(filters)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(12, 1, 5)  # more than enough inputs of one value at the output's only place
    first, second = normal(filters, 1, 3), normal(filters, filters, 3)

    def answers(a: Tensor, b: Tensor) -> Tensor:
        hidden = nn.functional.conv1d(x, a)
        return nn.functional.conv1d(hidden, b).flatten()

    parts = torch.func.jacrev(answers, argnums=(0, 1))(first, second)
    jacobian = torch.cat([part.flatten(1) for part in parts], 1)
    return int(torch.linalg.matrix_rank(jacobian))


def descent(seed: int) -> list[dict[str, float]]:
    """A head of 65 inputs refitted on n images: a tiny fixed ridge, and leave-one-out."""
    x, y, held_out, truth = digits(seed)
    x, held_out = x.double(), held_out.double()
    goals = nn.functional.one_hot(y, 10).double()
    rows = []
    for count in (10, 20, 40, 55, 64, 75, 100, 200, 400, 1200):
        some, goal = x[:count], goals[:count]
        mean, middle = some.mean(0), goal.mean(0)
        centred, rest = some - mean, goal - middle
        gram, cross = centred.T @ centred / count, rest.T @ centred / count
        made = LeaveOut(cross, gram, mean, middle, count, torch.zeros(10, 64), torch.zeros(10),
                        (FIXED, *STRENGTHS))  # fmt: skip
        for i in range(count):
            made.update(some[i : i + 1], goal[i : i + 1])
        best = made.scores().best

        def accuracy(choice: Any, made: LeaveOut = made) -> float:
            weight, bias = made.solution(choice)
            return float(((held_out @ weight.T + bias).argmax(1) == truth).float().mean())

        chosen = best if isinstance(best, float) and best < inf else -1.0
        rows.append({"images": count, "fixed": accuracy(FIXED), "left out": accuracy(best),
                     "strength": chosen})  # fmt: skip
    return rows


def quantised(seed: int) -> list[dict[str, float]]:
    """KL by rounding to so many bits, forecast and measured, on held-out and training images."""
    x, y, held_out, _ = digits(seed)
    model, rows = trained(64, seed, x, y, 300), []
    for bits in (8, 7, 6, 5, 4, 3):
        after = copy.deepcopy(model)
        with torch.no_grad():
            for p in after.parameters():
                if p.ndim == 2:
                    p.add_(rounding(p, bits))
        row: dict[str, float] = {"bits": bits}
        for name, images in (("held out", held_out), ("training", x)):
            told = forecast(model, [(images, None)], difference(model, after), "classes")
            _, apart, _ = measured(model, after, [(images, None)], "classes")
            row[name], row[f"{name}, forecast"] = apart.value, told.quadratic.value
        rows.append(row)
    return rows


TRENDS: dict[str, Callable[[int], list[dict[str, float]]]] = {
    "Tokens become alike with depth": collapse,
    "Bounds of the Lipschitz constant over width": slopes,
    "Rank of a linear CNN's Hessian": ranks,
    "Double descent of a refit, and leave-one-out": descent,
    "KL of rounded weights, forecast and measured": quantised,
}


def table(rows: Sequence[dict[str, float]]) -> list[str]:
    """Return rows as a Markdown table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return lines + [f"| {' | '.join(f'{r[n]:.3g}' for n in names)} |" for r in rows]


def pictures(found: dict[str, list[dict[str, float]]]) -> list[Panel]:
    """Return the tables as diagrams."""

    def line(name: str, x: str, y: str, style: str = "o-") -> Line:
        rows = [r for r in found[name] if r[y] != -1]
        return Line(y, [r[x] for r in rows], [r[y] for r in rows], style)

    deep, wide, cnn, refit, kl = found
    styles = {
        "plain": "o-", "plain, formula": "k:", "scaled": "s-", "scaled, formula": "k--",
        "lower": "o-", "upper": "s-", "fixed": "o-", "left out": "s-", "rank": "-", "counted": "o",
        "held out": "o-", "held out, forecast": "o:", "training": "s-", "training, forecast": "s:",
    }  # fmt: skip

    def lines(name: str, x: str, *ys: str) -> list[Line]:
        return [line(name, x, y, styles[y]) for y in ys]

    return [
        Panel(deep, "layers of uniform attention", "cosine of two tokens",
              lines(deep, "layers", "plain", "plain, formula", "scaled", "scaled, formula")),
        Panel("Lipschitz bounds over width", "hidden units", "slope of the answers",
              lines(wide, "width", "lower", "upper"), "x"),
        Panel(cnn, "parameters", "rank", lines(cnn, "parameters", "rank", "counted"), "xy"),
        Panel("Double descent of a refit", "calibration images (65 inputs)", "test accuracy",
              lines(refit, "images", "fixed", "left out"), "x"),
        Panel(kl, "bits", "nats a sample",
              lines(kl, "bits", "held out", "held out, forecast", "training",
                    "training, forecast"), "y"),
    ]  # fmt: skip


def main() -> None:
    """Run all, write the tables, settle the claims."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: make(arguments.seed) for name, make in TRENDS.items()}
    text = ["# The diagnostics' trends", "", f"Digits where data is needed, seed {arguments.seed}. "
            "Made by `make bench-trends`.", ""]  # fmt: skip
    for name, rows in found.items():
        text += [f"## {name}", "", *table(rows), ""]
    text += ["Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]
    if arguments.dry:
        print("\n".join(text))
    else:
        write("trends", {"trends": found, "machine": machine()}, "\n".join(text))
        draw("trends", pictures(found))
    deep, wide = found["Tokens become alike with depth"], found[
        "Bounds of the Lipschitz constant over width"
    ]  # fmt: skip
    cnn, refit = found["Rank of a linear CNN's Hessian"], found[
        "Double descent of a refit, and leave-one-out"
    ]  # fmt: skip
    slope = [log(b["rank"] / a["rank"]) / log(b["parameters"] / a["parameters"])
             for a, b in pairwise(cnn)]  # fmt: skip
    rounded = found["KL of rounded weights, forecast and measured"]
    settle(
        {
            "16 layers: plain cosine above 0.9, scaled below 0.3": deep[-1]["plain"] > 0.9
            and deep[-1]["scaled"] < 0.3,
            "lower bounds stay below upper ones": all(r["lower"] <= r["upper"] for r in wide),
            "rank grows as the root of the parameters": all(0.4 < s < 0.6 for s in slope),
            "ranks are those that are counted": all(
                r["counted"] in (-1, r["rank"]) for r in cnn
            ),
            "leave-one-out is never 5 points below the fixed ridge": all(
                r["left out"] > r["fixed"] - 0.05 for r in refit
            ),
            "at 64 images leave-one-out is better": refit[4]["left out"] > refit[4]["fixed"],
            "INT8's forecast is within a quarter on held-out images": abs(
                rounded[0]["held out, forecast"] / rounded[0]["held out"] - 1
            ) < 0.25,
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()
