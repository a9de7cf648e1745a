"""A sweep of four widths against four runs of their own, in seconds (`make bench-sweep`)."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common import machine, settle, write

from slimfuse.store import file_digest

RECIPE = Path("recipes/vit/digits.yaml")
OUT = Path("runs/bench-sweep")
WIDTHS = ("0.75", "0.5", "0.375", "0.25")
KEY = "target.hidden_size"
MOST = 0.6  # of the separate runs' seconds
FINISHED = (0, 3)  # 3: a gate failed, all was made


@dataclass(frozen=True)
class Spent:
    """Seconds of one command: by the clock, and of the processors."""

    wall: float
    cpu: float


def timed(*arguments: str) -> Spent:
    """Run slimfuse in a process of its own."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([sys.executable, "-m", "slimfuse", *arguments], check=False)
    assert done.returncode in FINISHED, f"{arguments} ended with {done.returncode}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(round(time.monotonic() - start, 1), round(cpu, 1))


def main() -> None:
    """Time both ways and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--widths", nargs="*", default=WIDTHS)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    home = OUT / given.recipe.stem
    shutil.rmtree(home, ignore_errors=True)  # stages of an earlier try would cost nothing
    fixed = ("--set", f"runtime.threads={given.threads}")
    alone: dict[str, Spent] = {}
    for width in given.widths:
        out = str(home / f"alone-{width}")
        alone[width] = timed(
            "compress", str(given.recipe), *fixed, "--set", f"{KEY}={width}", "--out", out
        )
    values = f"{KEY}={','.join(given.widths)}"
    out = home / "sweep"
    together = timed("sweep", str(given.recipe), *fixed, "--set", values, "--out", str(out))
    found = json.loads((out / "sweep.json").read_text())
    same = {
        width: file_digest(home / f"alone-{width}" / "model" / "model.safetensors")
        == file_digest(out / one["folder"] / "model" / "model.safetensors")
        for width, one in zip(given.widths, found["candidates"], strict=True)
    }
    sums = Spent(*(round(sum(getattr(s, k) for s in alone.values()), 1) for k in ("wall", "cpu")))
    ratio = {k: getattr(together, k) / getattr(sums, k) for k in ("wall", "cpu")}
    stages = sorted(found["timings"].items(), key=lambda item: -item[1])
    lines = [
        f"# {given.recipe.stem}: a sweep of {len(alone)} widths against {len(alone)} runs",
        "",
        f"`{given.recipe}`, `--set {values}` against one `compress` for each value, every command "
        f"in a process of its own and a new folder, {given.threads} thread"
        f"{'s' * (given.threads > 1)}, once, one after the other. Made by `make bench-sweep`.",
        "",
        "| command | seconds | CPU seconds |",
        "| --- | --- | --- |",
        *(f"| compress, {KEY}={w} | {s.wall:.0f} | {s.cpu:.0f} |" for w, s in alone.items()),
        f"| all {len(alone)} runs | {sums.wall:.0f} | {sums.cpu:.0f} |",
        f"| sweep | {together.wall:.0f} | {together.cpu:.0f} |",
        f"| ratio | {ratio['wall']:.0%} | {ratio['cpu']:.0%} |",
        "",
        "Seconds of the sweep's stages, shared ones once: "
        + ", ".join(f"{name} {spent:.0f}" for name, spent in stages if spent >= 1)
        + ".",
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()),
        "",
    ]
    name = "sweep" if given.recipe == RECIPE else f"sweep-{given.recipe.stem}"
    data = {
        "alone": {width: asdict(spent) for width, spent in alone.items()},
        "sweep": asdict(together), "ratio": ratio, "same_bytes": same,
        "timings": found["timings"], "machine": machine(),
    }  # fmt: skip
    write(name, data, "\n".join(lines))
    settle(
        {
            # both: other work on the machine changes the clock's, and it may not last evenly
            f"the sweep takes less than {MOST:.0%} of the runs' {name}": ratio[kind] < MOST
            for kind, name in (("wall", "seconds"), ("cpu", "CPU seconds"))
        }
        | {
            "every model has the same bytes either way": all(same.values()),
        }
    )


if __name__ == "__main__":
    main()
