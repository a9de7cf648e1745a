"""The quality budget: what each stage of a run spent of the best parent's figure, or won back."""

from __future__ import annotations

from dataclasses import dataclass

from slimfuse.report import words
from slimfuse.report.rows import Figure, Report, Row, Stage
from slimfuse.report.verdict import best, primary_metric, reference

ORDER: tuple[Stage, ...] = ("fused", "finetuned", "sparse", "onnx", "onnx-int8")
DOING = {
    "fused": "fusing", "finetuned": "finetuning", "sparse": "pruning", "onnx": "the ONNX export",
    "onnx-int8": "INT8",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A stage: the row that ends it, its figure, and what was spent since the row before it.

    spent: in the metric's own unit, above nought where the figure became worse.
    """

    row: Row
    figure: Figure
    spent: float


@dataclass(frozen=True)
class Budget:
    """The stages of a run in order, from the best parent's figure to the last file's."""

    metric: str
    parent: Row
    steps: tuple[Step, ...]

    @property
    def start(self) -> Figure:
        """The best parent's figure."""
        return self.parent.metrics[self.metric]

    @property
    def total(self) -> float:
        """What all stages spent together."""
        sign = -1.0 if words.lower_is_better(self.metric) else 1.0
        return sign * (self.start.value - self.steps[-1].figure.value)

    def amount(self, value: float) -> str:
        """Return a difference of figures, without its sign: 3.5 points."""
        factor, unit = words.scale(self.metric, self.start)
        if unit == "%":
            return f"{abs(value) * factor:.2f} points"
        return f"{words.number(abs(value))} {unit}".strip()

    def signed(self, value: float) -> str:
        """Return a change of the figure as it is drawn: −3.51 where that much was lost of it."""
        change = value if words.lower_is_better(self.metric) else -value
        factor, unit = words.scale(self.metric, self.start)
        size = abs(change) * factor
        text = f"{size:.2f}" if unit == "%" else words.number(size)
        if not any(digit in text for digit in "123456789"):
            return "±0"
        return f"{'−' if change < 0 else '+'}{text}"

    def none(self, value: float) -> bool:
        """Whether a difference is too small to be shown."""
        return self.signed(value) == "±0"


def budget(report: Report) -> Budget | None:
    """Return what each stage spent, None where parent, child or metric were not measured."""
    metric, parent = primary_metric(report), reference(report)
    if metric is None or parent is None or metric not in parent.metrics:
        return None
    before, steps = parent.metrics[metric], []
    sign = -1.0 if words.lower_is_better(metric) else 1.0
    for stage in ORDER:
        row = best([r for r in report.rows if r.stage == stage and metric in r.metrics], metric)
        if row is not None:
            after = row.metrics[metric]
            steps.append(Step(row, after, sign * (before.value - after.value)))
            before = after
    return Budget(metric, parent, tuple(steps)) if steps else None


def told(found: Budget) -> str:
    """Return which stage spent what, in one sentence."""
    parts = []
    for step in found.steps:
        what = DOING[step.row.stage]
        if found.none(step.spent):
            parts.append(f"{what} changed nothing")
        else:
            verb = "spent" if step.spent > 0 else "won"
            parts.append(f"{what} {verb} {found.amount(step.spent)}")
    end = found.steps[-1]
    loss = "no more and no less"
    if not found.none(found.total):
        loss = f"{found.amount(found.total)} {'worse' if found.total > 0 else 'better'}"
    return (
        f"From parent {found.parent.name}'s {words.measured(found.metric, found.start)} to "
        f"{words.measured(found.metric, end.figure)} in {end.row.name}, {loss} in all: "
        f"{', '.join(parts)}."
    )
