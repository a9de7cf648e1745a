"""The pipeline: the only room that reads recipes."""

from slimfuse.pipeline.comparison import Comparison, compare
from slimfuse.pipeline.run import Run, compress, plan
from slimfuse.pipeline.sparse_verb import sparsify
from slimfuse.pipeline.sweep_verb import Sweep, sweep

__all__ = ["Comparison", "Run", "Sweep", "compare", "compress", "plan", "sparsify", "sweep"]
