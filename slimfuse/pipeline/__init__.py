"""The pipeline: the only room that reads recipes."""

from slimfuse.pipeline.comparison import Comparison, compare
from slimfuse.pipeline.run import Run, compress, plan
from slimfuse.pipeline.sparse_verb import sparsify

__all__ = ["Comparison", "Run", "compare", "compress", "plan", "sparsify"]
