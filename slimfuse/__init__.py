"""slimfuse: fuse trained transformers of any widths into one narrower standard model."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
