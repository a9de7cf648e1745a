"""What this machine has: versions, cores, precision, disk, data."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "slimfuse", "slimfuse-export", "torch", "transformers", "accelerate", "POT", "onnx",
    "onnxruntime",
)  # fmt: skip
LITTLE_DISK = 2 << 30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's findings."""

    name: str
    detail: str
    passed: bool = True


def examine() -> Iterator[Check]:
    """Yield what was found, worst news marked as not passed."""
    for package in PACKAGES:
        try:
            yield Check(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "missing: pip install -c constraints.txt ./export .", False)
    import torch

    from slimfuse.data.fashion_mnist import SYSTEM, cache_folder
    from slimfuse.finetune.loop import best_precision
    from slimfuse.pipeline.job import cores
    from slimfuse.store import free_bytes

    yield Check("python", platform.python_version())
    yield Check("cores", f"{cores()} usable, training in {best_precision()}")
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, CPU only"
    yield Check("accelerator", accelerator)
    if importlib.util.find_spec("torchvision") is not None:
        yield Check(
            "torchvision", "installed, but not needed and a cause of trouble beside CPU torch"
        )
    free = free_bytes(Path.cwd())
    yield Check("disk", f"{free / 2**30:.1f} GiB free here", free > LITTLE_DISK)
    there = [str(f) for f in (SYSTEM, cache_folder()) if f.is_dir()]
    found = there[0] if there else "not here; fetched from the Debian package when a recipe asks"
    yield Check("fashion-mnist", found)
    from slimfuse_export import quantization_plan

    yield Check("INT8", quantization_plan().reason)
