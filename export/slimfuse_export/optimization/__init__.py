"""Other graphs of the same model: made, checked, timed, and kept only where they win."""

from slimfuse_export.optimization.choosing import Optimized, Trial, optimize_folder

__all__ = ["Optimized", "Trial", "optimize_folder"]
