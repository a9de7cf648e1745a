"""Tasks: one file each."""

from slimfuse.tasks.base import Augmentation, Measured, Samples, Task, accuracy, logits
from slimfuse.tasks.image_classification import ImageClassification
from slimfuse.tasks.text_classification import TextClassification

TASKS: dict[str, Task] = {task.name: task for task in (ImageClassification(), TextClassification())}
"""The tasks that a recipe may name."""

__all__ = [
    "TASKS", "Augmentation", "ImageClassification", "Measured", "Samples", "Task",
    "TextClassification", "accuracy", "logits",
]  # fmt: skip
