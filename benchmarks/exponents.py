"""How a fuse's time and memory grow (`make bench-exponents`).

Random-weight ViTs into half their width; one size changes at a time. Time: CPU seconds of `refit`,
one thread, which other work on the machine hardly changes. Memory: the peak of a process of its
own, less what it held before the parents were opened. Exponents: slopes of straight lines through
the logarithms. Of samples it is below one: a fit takes a draw of their tokens, of bounded size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import machine, settle, write
from plots import Line, Panel, draw
from scale import PATCH, batches

from slimfuse.families import FAMILIES, Shape
from slimfuse.fuse.refit import Parent, Settings, refit

SIDE = 64  # pixels: 16 patches and the class token
BATCH = 32


@dataclass(frozen=True)
class Case:
    """One fuse: width, blocks, parents and calibration samples."""

    width: int = 192
    depth: int = 4
    parents: int = 1
    samples: int = 512


AXES = {
    "width": (96, 192, 384, 768),
    "depth": (2, 4, 8, 16),
    "parents": (1, 2, 3, 4),
    "samples": (1024, 2048, 4096, 8192),  # from where buffers are full
}
WANTED = {"width, seconds": (0, 3), "samples, seconds": (0.7, 1.1), "samples, bytes": (-0.1, 0.15)}


def one(case: Case) -> None:
    """Measure one case in this process and print it as JSON."""
    torch.set_num_threads(1)
    family = FAMILIES["vit"]
    heads = case.width // 48
    wide = Shape(case.width, heads, 4 * case.width, case.depth)
    narrow = Shape(case.width // 2, heads, 2 * case.width, case.depth)
    with tempfile.TemporaryDirectory() as folder:
        config = family.new_config(wide, patch_size=PATCH, image_size=SIDE, labels="ab")
        for i in range(case.parents):
            torch.manual_seed(i)
            family.build(config).save_pretrained(Path(folder) / str(i))  # type: ignore[operator]
        target = family.build(family.narrow(config, narrow))
        warm = list(batches(BATCH, SIDE, BATCH))
        with torch.no_grad():
            target(warm[0])
        before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        given = [Parent(f"p{i}", family.load(Path(folder) / str(i))) for i in range(case.parents)]
        count = -(-case.samples // BATCH)
        start = time.process_time()
        refit(given, target, family, lambda: batches(case.samples, SIDE, BATCH), Settings(),
              n_batches=count)  # fmt: skip
        seconds = time.process_time() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(asdict(case) | {"seconds": seconds, "bytes": peak - before}))


def measured(case: Case) -> dict[str, float]:
    """Return one case's figures, measured in a process of its own."""
    words = [sys.executable, __file__, "--one", json.dumps(asdict(case))]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(found, flush=True)
    return found


def exponent(rows: list[dict[str, float]], axis: str, key: str) -> float:
    """Return the slope of log(key) over log(axis)."""
    x, y = (np.log([max(row[name], 1.0) for row in rows]) for name in (axis, key))
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one")
    arguments = parser.parse_args()
    if arguments.one:
        one(Case(**json.loads(arguments.one)))
        return
    done: dict[Case, dict[str, float]] = {}
    for axis, sizes in AXES.items():
        for size in sizes:
            case = replace(Case(), **{axis: size})
            if case not in done:
                done[case] = measured(case)
    found = {a: [done[replace(Case(), **{a: size})] for size in s] for a, s in AXES.items()}
    slopes = {
        f"{axis}, {key}": exponent(rows, axis, key)
        for axis, rows in found.items()
        for key in ("seconds", "bytes")
    }
    lines = ["# How a fuse grows", "", str(__doc__).strip(), "", f"Where nothing else is said: "
             f"{Case()}, 17 tokens a sample.".replace("Case", ""), ""]  # fmt: skip
    for axis, rows in found.items():
        lines += [f"| {axis} | CPU seconds | MiB |", "| --- | --- | --- |"]
        lines += [
            f"| {r[axis]:.0f} | {r['seconds']:.1f} | {r['bytes'] / 2**20:.0f} |" for r in rows
        ]
        lines += ["", f"Exponents: time {slopes[f'{axis}, seconds']:.2f}, memory "
                      f"{slopes[f'{axis}, bytes']:.2f}.", ""]  # fmt: skip
    lines += ["Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]
    write("exponents", {"rows": found, "exponents": slopes, "machine": machine()}, "\n".join(lines))
    picture(found, slopes)
    settle(
        {
            f"{name}: exponent within {low} and {high}": low <= slopes[name] <= high
            for name, (low, high) in WANTED.items()
        }
    )


def picture(found: dict[str, list[dict[str, float]]], slopes: dict[str, float]) -> None:
    """Draw time over each size."""
    draw(
        "exponents",
        [
            Panel(f"over {axis}: time ∝ {axis}^{slopes[f'{axis}, seconds']:.2f}", axis,
                  "CPU seconds",
                  [Line("time", [r[axis] for r in rows], [r["seconds"] for r in rows])], "xy")
            for axis, rows in found.items()
        ],
        columns=4,
    )  # fmt: skip


if __name__ == "__main__":
    main()
