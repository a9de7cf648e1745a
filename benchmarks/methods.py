"""All methods and controls to half width on Fashion-MNIST, three seeds (`make bench-methods`)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from common import RESULTS, machine, settle
from zoo import anchor, fashion

from slimfuse.pipeline.comparison import compare, lead, markdown

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-methods")
SEEDS = (0, 1, 2)
STEPS = (0, 300, 1000)


def main() -> None:
    """Run the comparison and keep its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    homes = {(fashion(s), fashion(s, 1), anchor(s)) for s in arguments.seeds}
    zoo = next(iter(homes))[0].parent
    found = compare(
        RECIPE,
        seeds=arguments.seeds,
        steps=STEPS,
        overrides=(
            f"parents=[{{name: a, from: {zoo}/fashion-{{seed}}-a}}, "
            f"{{name: b, from: {zoo}/fashion-{{seed}}-b}}]",
            f"fuse.ot.anchor={{from: {zoo}/anchor-{{seed}}}}",
            f"runtime.threads={arguments.threads}", "gates=[]",
        ),
        out=OUT,
    )  # fmt: skip
    if len(arguments.seeds) < len(SEEDS):
        return
    lines = [markdown(found), "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "methods.md").write_text("\n".join(lines))
    record = asdict(found) | {"machine": machine()}
    (RESULTS / "methods.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    own = found.entry(found.own)
    others = [e for e in found.entries if e.kind != "parent" and e is not own]
    claims = {}
    for other in others:
        for steps in found.budgets:
            values = other.figures.get(steps)
            ahead = None if values is None else lead(own.figures[steps], values)
            if ahead is not None and other.kind == "method":
                claims[f"{own.name} above {other.name} at {steps} steps (95 %)"] = ahead[1] > 0
    settle(claims)


if __name__ == "__main__":
    main()
