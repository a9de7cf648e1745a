"""An HTTP service for a finished folder; needs the extra `serve`."""

from slimfuse_export.serving.app import make_app
from slimfuse_export.serving.batching import Batcher, QueueFull
from slimfuse_export.serving.limits import Limits
from slimfuse_export.serving.server import serve

__all__ = ["Batcher", "Limits", "QueueFull", "make_app", "serve"]
