"""One run of every shipped recipe that has no table of its own (`make bench-shipped`).

Each is run as it is shipped, with its parents' places and the number of threads set; what is
finished is kept, so that the recipes may be run one after the other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, machine, write

from slimfuse.pipeline import Run, compress
from slimfuse.pipeline.run import quiet
from slimfuse.report import Row

RECIPES = Path("recipes")
OUT = Path("runs/bench-shipped")
SHIPPED: dict[str, tuple[str, ...]] = {
    "bert/minilm-l6-l3": (
        "parents.0.from=runs/zoo/minilm", "parents.1.from=runs/zoo/minilm-l3",
    ),
    "bert/rxnfp": (),
    "gpt2/prose": (),
    "timm-vit/dinov2-small": (),
}  # fmt: skip
"""Recipes with the changes that put the models of benchmarks/weights.py in their places."""


def figures(run: Run) -> dict[str, Any]:
    """Return what one run found, ready for JSON."""

    def of(row: Row) -> dict[str, Any]:
        found = {k: [x.value, x.low, x.high, x.n] for k, x in row.metrics.items()}
        return {"name": row.name, "stage": row.stage, "params": row.params, "metrics": found}

    speeds = [
        [s.base, s.other, s.threads, s.batch, s.ratio, s.low, s.high]
        for s in run.report.speedups
        if s.other in ("onnx", "onnx-int8")
    ]
    return {
        "rows": [of(row) for row in run.report.rows],
        "metric": run.report.metric,
        "speedups": speeds,
        "gates": [[g.rule, g.measured, g.passed] for g in run.report.gates],
        "minutes": sum(run.report.timings.values()) / 60,
    }


def markdown(found: dict[str, Any]) -> list[str]:
    """Return a table for each recipe."""
    lines = [
        "# Recipes as they are shipped, one run each",
        "",
        "One seed; in brackets the 95 % interval over the test samples. One process beside others "
        "on this machine: speed-ups are ratios of interleaved calls. "
        "`random-start` has the same finetuning. Made by `make bench-shipped`.",
        "",
    ]
    for name, one in found.items():
        keys = list(dict.fromkeys(k for row in one["rows"] for k in row["metrics"]))
        lines += [
            f"## {name}",
            "",
            f"| row | params | {' | '.join(keys)} |",
            f"| --- | ---: |{' ---: |' * len(keys)}",
        ]
        for row in one["rows"]:
            cells = (cell(row["metrics"].get(key)) for key in keys)
            lines.append(f"| {row['name']} | {row['params']:,} | {' | '.join(cells)} |")
        lines += [
            "",
            "| speed of | over | threads | batch | ratio |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        for base, other, count, batch, *ratio in one["speedups"]:
            told = "{:.2f} ({:.2f} – {:.2f})".format(*ratio)
            lines.append(f"| {other} | {base} | {count} | {batch} | {told} |")
        lines += ["", *(f"- gate {rule}: {seen}, {'held' if ok else 'FAILED'}"
                        for rule, seen, ok in one["gates"]),
                  f"- {one['minutes']:.0f} minutes, {one['threads']} thread(s)", ""]  # fmt: skip
    return [*lines, "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]


def cell(figure: list[float] | None) -> str:
    """Return a figure with its interval."""
    if figure is None:
        return "–"
    value, low, high, _ = figure
    return f"{value:.4g} ({low:.4g} – {high:.4g})"


def in_place(change: str) -> str:
    """Return a change of a recipe with a parent's folder as it is seen from anywhere."""
    key, value = change.split("=", 1)
    return f"{key}={Path(value).resolve()}" if key.endswith(".from") else change


def main() -> None:
    """Run what is asked for, and write the tables of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=list(SHIPPED), choices=list(SHIPPED))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    arguments = parser.parse_args()
    quiet()
    file = RESULTS / "shipped.json"
    found: dict[str, Any] = {}
    if file.is_file() and not arguments.fresh:
        found = json.loads(file.read_text())["recipes"]
    for name in arguments.recipes:
        if name in found:
            continue
        changes = tuple(in_place(change) for change in SHIPPED[name])
        run = compress(
            RECIPES / f"{name}.yaml",
            overrides=(*changes, f"runtime.threads={arguments.threads}"),
            out=OUT / name,
        )
        found[name] = figures(run) | {"threads": arguments.threads}
        ordered = {name: found[name] for name in SHIPPED if name in found}
        data = {"recipes": ordered, "machine": machine()}
        write("shipped", data, "\n".join(markdown(ordered)))


if __name__ == "__main__":
    main()
