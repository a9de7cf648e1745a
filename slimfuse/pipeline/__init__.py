"""The pipeline: the only room that reads recipes."""

from slimfuse.pipeline.run import Run, compress, plan

__all__ = ["Run", "compress", "plan"]
