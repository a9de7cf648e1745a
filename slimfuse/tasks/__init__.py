"""Tasks: what models do, how they are asked, taught and judged."""

from slimfuse.tasks.base import (
    Answer,
    Augmentation,
    Evidence,
    Samples,
    Task,
    answers_of,
    ask,
)
from slimfuse.tasks.criteria import Criterion
from slimfuse.tasks.embeddings import FeatureExtraction, SentenceEmbedding
from slimfuse.tasks.image_classification import ImageClassification
from slimfuse.tasks.language import (
    CausalLanguageModelling,
    LanguageTask,
    MaskedLanguageModelling,
)
from slimfuse.tasks.metrics import Measured, Metric, accuracy
from slimfuse.tasks.text_classification import TextClassification
from slimfuse.tasks.texts import TextTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ImageClassification(),
        TextClassification(),
        MaskedLanguageModelling(),
        CausalLanguageModelling(),
        SentenceEmbedding(),
        FeatureExtraction(),
    )
}
"""The tasks that a recipe may name."""

__all__ = [
    "TASKS",
    "Answer",
    "Augmentation",
    "CausalLanguageModelling",
    "Criterion",
    "Evidence",
    "FeatureExtraction",
    "ImageClassification",
    "LanguageTask",
    "MaskedLanguageModelling",
    "Measured",
    "Metric",
    "Samples",
    "SentenceEmbedding",
    "Task",
    "TextClassification",
    "TextTask",
    "accuracy",
    "answers_of",
    "ask",
]  # fmt: skip
