"""The pipeline: the only room that reads recipes."""

from slimfuse.pipeline.comparison import Comparison, compare
from slimfuse.pipeline.diagnose_verb import Diagnosis, diagnose
from slimfuse.pipeline.run import Run, compress, plan
from slimfuse.pipeline.sparse_verb import sparsify
from slimfuse.pipeline.sweep_verb import Sweep, sweep

__all__ = [
    "Comparison", "Diagnosis", "Run", "Sweep", "compare", "compress", "diagnose", "plan",
    "sparsify", "sweep",
]  # fmt: skip
