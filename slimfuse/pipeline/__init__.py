"""The pipeline: the only room that reads recipes."""

from slimfuse.pipeline.comparison import Comparison, compare
from slimfuse.pipeline.diagnose_verb import Diagnosis, diagnose
from slimfuse.pipeline.reproduce_verb import Reproduction, reproduce
from slimfuse.pipeline.run import Run, compress, plan
from slimfuse.pipeline.sparse_verb import sparsify
from slimfuse.pipeline.sweep_verb import Sweep, sweep

__all__ = [
    "Comparison", "Diagnosis", "Reproduction", "Run", "Sweep", "compare", "compress", "diagnose",
    "plan", "reproduce", "sparsify", "sweep",
]  # fmt: skip
