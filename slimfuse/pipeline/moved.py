"""What samples without one right class came to: whose error or similarity changed most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.mistakes import clipped, looks
from slimfuse.report import Example, Finding, words
from slimfuse.tasks import Evidence, LanguageTask
from slimfuse.tasks.criteria import Numeric, Several
from slimfuse.tasks.embeddings import disjoint_pairs
from slimfuse.tasks.metrics import bootstrap

Move = Literal["worse", "better", "nearer", "further"]
SHOWN: Mapping[Move, int] = {"worse": 6, "better": 3, "nearer": 4, "further": 4}
"""How many examples are shown of each kind."""
NAMES = 80  # characters of a sample's labels
UNSEEN = 5e-4  # a change of a cosine that no figure shows
Moved = tuple[tuple[Finding, ...], tuple[Example, ...], str]
EXTREMES = "They are the extremes, not typical ones: the table of errors above counts them all."


def moved(
    job: BaseJob, best: str, evidence: Mapping[str, Evidence], passages: Sequence[Example] = ()
) -> Moved:
    """Return tables and examples of what the child says otherwise, and how they were chosen.

    best: the better parent; evidence: what the parents, and as `finetuned` the child, say of the
    test set; passages: of a language model, see `find_passages`. Nothing where samples have one
    class each: see `mistakes`.
    """
    task = job.task
    if task.by_class:
        return (), (), ""
    if isinstance(task, LanguageTask):
        return _language(job, best, evidence, passages)
    if task.compares:
        return _embedding(job, evidence)
    if isinstance(task.criterion, Numeric):
        return _numbers(job, best, evidence)
    return _labels(job, best, evidence) if isinstance(task.criterion, Several) else ((), (), "")


def furthest(change: Tensor, kinds: tuple[Move, Move]) -> Iterator[tuple[Move, int]]:
    """Yield kind and place of what rose most (the first kind), then of what fell most."""
    for kind, sign in zip(kinds, (1, -1), strict=True):
        order = (-sign * change).argsort(stable=True)[: SHOWN[kind]]
        yield from ((kind, int(place)) for place in order if sign * float(change[place]) > 0)


def mean_losses(evidence: Evidence) -> Tensor:
    """Return a language model's mean loss a token (n,) of each sample, in nats."""
    return evidence["nll"] / evidence["tokens"].clamp_min(1)


def _language(
    job: BaseJob, best: str, evidence: Mapping[str, Evidence], passages: Sequence[Example]
) -> Moved:
    change = mean_losses(evidence["finetuned"]) - mean_losses(evidence[best])
    noun = job.task.sample
    table = _table(f"Loss of parent {best} and of the child", noun, "loss", change,
                   f"{len(change)} {noun}s of the test set, nats a token, each one's mean.",
                   "nats a token")  # fmt: skip
    chosen = (
        f"Of {len(change)} {noun}s those whose mean loss rose most from parent {best} to the "
        "child, then those where it fell most; of each the token whose loss changed most, [?] in "
        "its context. What each model holds likeliest there, and what it gives the right token. "
        f"{EXTREMES}"
    )
    return (table,), tuple(passages), chosen if passages else ""


def _embedding(job: BaseJob, evidence: Mapping[str, Evidence]) -> Moved:
    child = evidence["finetuned"]["embeddings"]
    every = [evidence[parent.name] for parent in job.teachers]
    reference = job.task.gist(every, [parent.weight for parent in job.teachers])
    assert reference is not None, "the task compares"
    left, right = disjoint_pairs(len(child))
    was, now = (_cosines(rows, left, right) for rows in (reference, child))
    change = now - was
    half, most = change.abs().quantile(torch.tensor([0.5, 0.95]).to(change)).tolist()
    change = torch.where(change.abs() < UNSEEN, 0.0, change)
    parts = (("nearer", change > 0), ("further apart", change < 0), ("the same", change == 0))
    rows = [_line(name, change[mask], "{:+.3f}") for name, mask in parts if bool(mask.any())]
    mean = bootstrap(lambda i: change[i].mean(), len(change))
    whose = "the parents' (weighted mean)" if len(every) > 1 else f"parent {job.teachers[0].name}'s"
    table = Finding(
        "How far similarities moved",
        f"{len(change)} disjoint random pairs of the {len(child)} test samples; cosines of the "
        f"child less {whose}.",
        ("pairs", "count", "mean change", "largest"),
        (*rows, _line("all", change, "{:+.3f}")),
        f"Half of the cosines moved by at most {half:.3f}, 95 % by at most {most:.3f}; on average "
        f"by {mean.value:+.3f} (95 % interval {mean.low:+.3f} to {mean.high:+.3f}).",
        "errors",
    )
    examples = []
    for kind, place in furthest(change, ("nearer", "further")):
        one, other = int(left[place]), int(right[place])
        text, image = looks(job.data.test.items[one])
        other_text, other_image = looks(job.data.test.items[other])
        examples.append(
            Example(one, "", f"cos {was[place]:.3f}", f"cos {now[place]:.3f}", kind, text, image,
                    other, other_text, other_image)
        )  # fmt: skip
    chosen = (
        f"Of {len(change)} disjoint random pairs of test samples those that came nearer most, then "
        f"those that went furthest apart: their cosine by {whose} embeddings and by the child's. "
        f"{EXTREMES}"
    )
    return (table,), tuple(examples), chosen if examples else ""


def _cosines(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    unit = nn.functional.normalize(rows.double(), dim=1)
    return (unit[left] * unit[right]).sum(1)


def _numbers(job: BaseJob, best: str, evidence: Mapping[str, Evidence]) -> Moved:
    labels = evidence[best]["labels"].double()
    was, now = (evidence[name]["logits"][:, 0].double() for name in (best, "finetuned"))
    change = (now - labels).abs() - (was - labels).abs()
    table = _table(f"Errors of parent {best} and of the child", "sample", "absolute error", change,
                   f"{len(change)} test samples; absolute errors, in the label's unit.",
                   "of the label's unit")  # fmt: skip
    examples = tuple(
        Example(place, words.number(float(labels[place])), words.number(float(was[place])),
                words.number(float(now[place])), kind, *looks(job.data.test.items[place]))
        for kind, place in furthest(change, ("worse", "better"))
    )  # fmt: skip
    return (table,), examples, _chosen(len(change), "absolute error", best) if examples else ""


def _labels(job: BaseJob, best: str, evidence: Mapping[str, Evidence]) -> Moved:
    labels = evidence[best]["labels"] > 0.5
    was, now = (evidence[name]["logits"] > 0 for name in (best, "finetuned"))
    change = (now != labels).sum(1).double() - (was != labels).sum(1).double()
    table = _table(f"Errors of parent {best} and of the child", "sample",
                   "number of wrong labels", change,
                   f"{len(change)} test samples; labels of each that are missing or too many, of "
                   f"{labels.shape[1]}.", "labels a sample")  # fmt: skip

    def told(row: Tensor) -> str:
        names = [str(job.data.classes[int(i)]) for i in row.nonzero()]
        return clipped(", ".join(names), NAMES) or "none"

    examples = tuple(
        Example(place, told(labels[place]), told(was[place]), told(now[place]), kind,
                *looks(job.data.test.items[place]))
        for kind, place in furthest(change, ("worse", "better"))
    )  # fmt: skip
    chosen = _chosen(len(change), "number of wrong labels", best) if examples else ""
    return (table,), examples, chosen


def _chosen(count: int, what: str, best: str) -> str:
    return (
        f"Of {count} test samples those whose {what} rose most from parent {best} to the child, "
        f"then those where it fell most. {EXTREMES}"
    )


def _table(
    title: str, noun: str, what: str, change: Tensor, conditions: str, unit: str
) -> Finding:  # fmt: skip
    """Return how many samples got worse and better, and by how much on average."""
    parts = (("child worse", change > 0), ("child better", change < 0), ("the same", change == 0))
    rows = [_line(name, change[mask]) for name, mask in parts if bool(mask.any())]
    mean = bootstrap(lambda i: change[i].mean(), len(change))
    chance = ", which may be chance" if mean.low <= 0 <= mean.high else ""
    return Finding(
        title,
        conditions,
        (f"{noun}s", "count", "mean change", "largest"),
        (*rows, _line("all", change)),
        f"On average the child's {what} is {mean.value:+.3g} {unit} off the parent's (95 % "
        f"interval over {noun}s {mean.low:+.3g} to {mean.high:+.3g}){chance}.",
        "errors",
    )


def _line(name: str, change: Tensor, form: str = "{:+.3g}") -> tuple[str, ...]:
    most: Any = change[change.abs().argmax()]
    return name, str(len(change)), form.format(float(change.mean())), form.format(float(most))
