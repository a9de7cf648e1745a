"""Lets torchvision be imported beside a torch that its compiled operators weren't built for.

Then they don't load, and importing it, or timm, or anything of transformers that looks for it,
fails with "operator torchvision::nms does not exist". Declaring the two operators is enough for all
that is pure Python. Nothing happens where the operators load, or before torchvision is imported.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

SCHEMA = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # a library's operators live as long as it does


class Mending(importlib.abc.MetaPathFinder):
    """Sees torchvision's first import and declares its operators if they can't be loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None: others find the module."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            _mend(importlib.util.find_spec(name))
        return None


def _mend(spec: ModuleSpec | None) -> None:
    if spec is None or spec.origin is None:
        return
    import torch

    try:
        for file in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(file)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        library.define(SCHEMA)
        library.define(f"q{SCHEMA}")
        _kept.append(library)


def mend_torchvision() -> None:
    """Watch for torchvision's first import, once a process."""
    if "torchvision" not in sys.modules and not any(isinstance(f, Mending) for f in sys.meta_path):
        sys.meta_path.insert(0, Mending())


mend_torchvision()
