"""Time and memory of fusing 12-layer, 768-wide models (`make bench-scale`).

Each figure is taken in a process of its own, because the peak of a process never falls.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import RESULTS, machine, settle, write

from slimfuse.families import FAMILIES, Shape
from slimfuse.fuse import walk
from slimfuse.fuse.refit import Parent, Settings, refit

WIDE, HALF = Shape(768, 12, 3072, 12), Shape(384, 12, 1536, 12)
PATCH = 16
LARGE = 176  # pixels: 121 patches and the class token
SMALL = 64  # pixels: 16 patches and the class token
TIMED = 537  # samples of 122 tokens: the 65,536 tokens of 512 sequences of 128
LIMIT = 6 * 2**30


def batches(samples: int, side: int, size: int) -> Iterator[torch.Tensor]:
    """Yield random pixels, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, samples, size):
        count = min(size, samples - start)
        yield torch.randn(count, 3, side, side, generator=generator)


def parents(folder: Path, side: int, count: int) -> list[Parent]:
    """Return random-weight parents, opened from files as a run would."""
    family = FAMILIES["vit"]
    found = []
    for i in range(count):
        torch.manual_seed(i)
        path = folder / f"parent-{i}"
        if not path.exists():
            config = family.new_config(WIDE, patch_size=PATCH, image_size=side, labels="ab")
            family.build(config).save_pretrained(path)  # type: ignore[operator]
        found.append(Parent(f"p{i}", family.load(path)))
    return found


def one(kind: str, samples: int, threads: int) -> None:
    """Measure one case in this process and print it as JSON."""
    torch.set_num_threads(threads)
    side, count, size = (LARGE, 2, 16) if kind == "time" else (SMALL, 1, 128)
    family = FAMILIES["vit"]
    with tempfile.TemporaryDirectory() as folder:
        given = parents(Path(folder), side, count)
        forward = 0.0
        if kind == "time":
            start = time.perf_counter()
            with torch.no_grad():
                for batch in batches(samples, side, size):
                    for p in given:
                        layout = family.layout(p.model.config)
                        for x in walk.streams(p.model, layout, batch):
                            last = x
                        walk.read_out(p.model, layout, last)
            forward = time.perf_counter() - start
        target = family.build(family.narrow(given[0].model.config, HALF))
        n_batches = -(-samples // size)
        start = time.perf_counter()
        refit(given, target, family, lambda: batches(samples, side, size), Settings(),
              n_batches=n_batches)  # fmt: skip
        fused = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"samples": samples, "forward_s": forward, "fuse_s": fused, "peak": peak}))


def case(kind: str, samples: int, threads: int) -> dict[str, float]:
    """Return one case's figures, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, str(samples), str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(kind, figures, flush=True)
    return figures


def main() -> None:
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-only", action="store_true", help="keep the last measured time")
    arguments = parser.parse_args()
    if arguments.one:
        kind, samples, threads = arguments.one
        one(kind, int(samples), int(threads))
        return
    threads = arguments.threads
    if arguments.memory_only:  # which other work on the machine doesn't change
        timed = json.loads((RESULTS / "scale.json").read_text())["time"]
    else:
        timed = case("time", TIMED, threads) | {"threads": threads}
    few, many = (case("memory", n, threads) for n in (256, 4096))
    ratio = timed["fuse_s"] / timed["forward_s"]
    growth = many["peak"] / few["peak"]
    gib = 2**30
    lines = [
        "# Time and memory of a fuse: random-weight ViTs, 12 × 768 into 12 × 384",
        "",
        f"Float32 forward passes, {timed['threads']:.0f} threads. Made by `make bench-scale`.",
        "",
        f"Two parents, {TIMED} samples of 122 tokens (65,514 tokens): forward passes of the "
        f"parents alone {timed['forward_s']:.0f} s, `fuse` {timed['fuse_s']:.0f} s: "
        f"**{ratio:.2f} times** as long; peak {timed['peak'] / gib:.2f} GiB.",
        "",
        "| one parent, 17 tokens a sample | peak memory GiB |",
        "| --- | --- |",
        *(f"| {r['samples']:.0f} calibration samples | {r['peak'] / gib:.2f} |"
          for r in (few, many)),
        "",
        f"4 096 samples take {growth - 1:+.1%} of the memory of 256.",
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]  # fmt: skip
    write("scale", {"time": timed, "few": few, "many": many, "machine": machine()},
          "\n".join(lines))  # fmt: skip
    settle(
        {
            "fuse takes at most 4 times the parents' forward passes": ratio <= 4,
            "4 096 samples need within 10 % of the memory of 256": growth <= 1.1,
            "below 6 GiB": many["peak"] < LIMIT,
        }
    )


if __name__ == "__main__":
    main()
