"""One file per task: its batches, its loss, its metrics."""
