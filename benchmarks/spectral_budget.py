"""Budgets by loss-weighted spectra beside proportional ones (`make bench-spectral-budget`).

One ViT trained on Fashion-MNIST becomes narrower by three budgets of parameters; every seed has a
parent of its own. Rows of a budget have as many parameters, teachers, samples and steps.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from common import machine, settle, write
from zoo import fashion

from slimfuse.pipeline.comparison import compare, lead, markdown

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-spectral-budget")
SEEDS, STEPS = (0, 1, 2), (0, 300)
BUDGETS = (0.6, 0.4, 0.25)
KINDS = ("saliency", "spectrum")


def main() -> None:
    """Run three comparisons and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    zoo = {fashion(seed).parent for seed in arguments.seeds}.pop().resolve()
    tables, lines, claims = {}, ["# Budgets shared out by spectra", "", __doc__.strip(), ""], {}
    for budget in BUDGETS:
        found = compare(
            RECIPE,
            seeds=arguments.seeds,
            steps=STEPS,
            overrides=(
                f"parents=[{{name: a, from: {zoo}/fashion-{{seed}}-a}}]",
                "finetune.distill.teachers=[a]", "data.calibration.samples=512",
                "data.limit.train=8000",
                f"target={{budget: {{params: {budget}}}}}",
                f"runtime.threads={arguments.threads}", "gates=[]",
            ),
            vary=(f"target.budget.allocation={','.join(KINDS)}",),
            out=OUT / str(budget),
        )  # fmt: skip
        tables[str(budget)] = asdict(found)
        lines += [f"## {budget:.0%} of the parameters", "", markdown(found), ""]
        own = found.entry(found.own)
        other = next(e for e in found.entries if e.name.endswith("spectrum"))
        for steps in found.budgets:
            ahead = lead(other.figures[steps], own.figures[steps])
            claims[f"spectrum above proportional at {budget}, {steps} steps (95 %)"] = (
                ahead is not None and ahead[1] > 0
            )
    content = {"tables": tables, "machine": machine()}
    lines.append("Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()))
    write("spectral-budget", content, "\n".join(lines) + "\n")
    settle(claims)


if __name__ == "__main__":
    main()
