"""Load time and memory of a model, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimfuse_export.errors import CheckFailed

RUNS = 3
_CODE = """\
import json, sys, time
import numpy as np
from slimfuse_export.measuring.footprint import peak_bytes
from slimfuse_export.sessions import open_session
with np.load(sys.argv[3], allow_pickle=False) as stored:
    inputs = {name: stored[name] for name in stored.files}
before = peak_bytes()
start = time.perf_counter()
session = open_session(sys.argv[1], threads=int(sys.argv[2]))
loaded = time.perf_counter()
session.run(None, inputs)
answered = time.perf_counter()
for _ in range(3):
    session.run(None, inputs)
print(json.dumps([1e3 * (loaded - start), 1e3 * (answered - loaded), before, peak_bytes()]))
"""


@dataclass(frozen=True)
class Footprint:
    """What opening and running a model takes in a fresh process, medians of 3.

    load_ms: opening the session; its graph is optimised then. first_ms: the first call. peak_rss:
    most resident memory of the process, bytes. model_rss: how much of it came with the model.
    Both None where the platform doesn't say.
    """

    load_ms: float
    first_ms: float
    peak_rss: int | None
    model_rss: int | None


def footprint(
    path: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int = 1, runs: int = RUNS
) -> Footprint:
    """Open and run the model in `runs` fresh processes, one after the other.

    Raises: CheckFailed where such a process fails.
    """
    with tempfile.TemporaryDirectory(prefix="slimfuse-footprint-") as folder:
        file = Path(folder) / "inputs.npz"
        np.savez(file, allow_pickle=False, **dict(inputs))
        words = [sys.executable, "-c", _CODE, str(path), str(threads), str(file)]
        found = [_asked(words, path) for _ in range(runs)]
    load, first = (median(one[i] for one in found) for i in (0, 1))
    peaks = [(one[2], one[3]) for one in found if one[2] is not None]
    peak = round(median(after for _, after in peaks)) if peaks else None
    model = round(median(after - before for before, after in peaks)) if peaks else None
    return Footprint(load, first, peak, model)


def _asked(words: list[str], path: Path) -> list[Any]:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CheckFailed("the model does not run in a process of its own", where=path, got=last)
    found: list[Any] = json.loads(done.stdout)
    return found


def peak_bytes() -> int | None:
    """Return the most memory this process has had resident, None where the platform can't say."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the parent had before it started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
