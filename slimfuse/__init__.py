"""slimfuse: fuse trained transformers of any widths into one narrower standard model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import slimfuse.compat  # noqa: F401 - before anything that might import torchvision

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from slimfuse.pipeline import (
        Comparison,
        Diagnosis,
        Reproduction,
        Run,
        Sweep,
        compare,
        compress,
        diagnose,
        plan,
        reproduce,
        sparsify,
        sweep,
    )
    from slimfuse.stock import verify

__version__ = "0.1.0"
__all__ = [
    "Comparison", "Diagnosis", "Reproduction", "Run", "Sweep", "__version__", "compare",
    "compress", "diagnose", "plan", "reproduce", "sparsify", "sweep", "verify",
]  # fmt: skip

_HOMES = {
    "Comparison": "slimfuse.pipeline",
    "Diagnosis": "slimfuse.pipeline",
    "Reproduction": "slimfuse.pipeline",
    "Run": "slimfuse.pipeline",
    "Sweep": "slimfuse.pipeline",
    "compare": "slimfuse.pipeline",
    "compress": "slimfuse.pipeline",
    "diagnose": "slimfuse.pipeline",
    "plan": "slimfuse.pipeline",
    "reproduce": "slimfuse.pipeline",
    "sparsify": "slimfuse.pipeline",
    "sweep": "slimfuse.pipeline",
    "verify": "slimfuse.stock",
}


def __getattr__(name: str) -> Any:
    """Import the verbs on first use: `import slimfuse` stays light, as recipe checks need."""
    if name not in _HOMES:
        raise AttributeError(f"module 'slimfuse' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
