"""Text classification: one label, any of several, or a number, of each text."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from slimfuse.data import DataSet
from slimfuse.tasks.base import Evidence, Measures
from slimfuse.tasks.criteria import Categorical, Criterion, Numeric, Several
from slimfuse.tasks.metrics import (
    Metric,
    absolute_error,
    accuracy,
    average_precision,
    macro_f1,
    micro_f1,
    rank_correlation,
)
from slimfuse.tasks.texts import TextTask, Tokens, backend

KINDS: Mapping[str, tuple[Criterion, tuple[Metric, ...]]] = {
    "single": (Categorical(), (Metric("accuracy"), Metric("macro_f1"))),
    "multi": (Several(), (Metric("micro_f1"), Metric("average_precision"))),
    "regression": (
        Numeric(),
        (Metric("spearman", share=False), Metric("mae", "lower", share=False)),
    ),
}
"""Criterion and metrics by what a text's label is."""

PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls the kinds."""


class TextClassification(TextTask):
    """Texts of one label each, of several, or of a number.

    kind: single, multi or regression, as the data set's labels are.
    """

    name = "text-classification"
    auto_model = "AutoModelForSequenceClassification"
    kind = "single"

    def of(self, data: DataSet) -> TextClassification:
        """Return the task for labels of this kind."""
        found = copy.copy(self)
        found.kind = getattr(data, "kind", "single")
        found.criterion, found.metrics = KINDS[found.kind]
        found.by_class = found.kind == "single"
        return found

    def marked(self, config: Any) -> Any:
        """Return a copy of a config with its problem_type, which single labels don't need."""
        if self.kind == "single":
            return config
        named = copy.deepcopy(config)
        named.problem_type = PROBLEMS[self.kind]
        return named

    def measures(self, evidence: Evidence, reference: Tensor | None = None) -> Measures:
        """Return accuracy and macro F1; micro F1 and average precision; or rank and error."""
        scores, labels = evidence["logits"], evidence["labels"]
        if self.kind == "multi":
            return {
                "micro_f1": lambda: micro_f1(scores, labels),
                "average_precision": lambda: average_precision(scores, labels),
            }
        if self.kind == "regression":
            return {
                "spearman": lambda: rank_correlation(scores[:, 0], labels),
                "mae": lambda: absolute_error(scores[:, 0], labels),
            }
        return {
            "accuracy": lambda: accuracy(scores, labels),
            "macro_f1": lambda: macro_f1(scores, labels),
        }


__all__ = ["KINDS", "PROBLEMS", "TextClassification", "Tokens", "backend"]
