"""Where the best parent and the child err: how often, in which classes, on which samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slimfuse.pipeline.common import BaseJob
from slimfuse.report import Example, Finding, Picture
from slimfuse.report.rows import PNG, Change
from slimfuse.tasks import Evidence

MOST_CLASSES = 40  # that a picture can show
MOST_PAIRS = 8
SHOWN: Mapping[Change, int] = {"new error": 6, "mended": 3, "both wrong": 3}
"""How many examples are shown of each kind."""
SIDE = 64  # pixels of an example's image
LENGTH = 160  # characters of an example's text
Answers = NDArray[np.int64]


def mistakes(
    job: BaseJob, best: str, evidence: Mapping[str, Evidence]
) -> tuple[list[Picture], tuple[Finding, ...], tuple[Example, ...]]:
    """Return pictures, tables and examples of the errors of the best parent and the child.

    best: the better parent; evidence: what the parents, and as `finetuned` the child, say of the
    test set. Nothing where samples have no one class each.
    """
    if not job.task.by_class:
        return [], (), ()
    labels, classes = np.asarray(job.data.test.labels), [str(c) for c in job.data.classes]
    before, after = (evidence[name]["logits"].argmax(1).numpy() for name in (best, "finetuned"))
    tables = _together(labels, before, after, best), *_pairs(labels, before, after, classes, best)
    return (
        _pictures(labels, before, after, classes, best),
        tables,
        _examples(job, labels, evidence[best]["logits"], evidence["finetuned"]["logits"], classes),
    )


def confusion(labels: Answers, said: Answers, classes: int) -> NDArray[np.int64]:
    """Return how many samples of each class (row) were taken for each (column)."""
    return np.bincount(labels * classes + said, minlength=classes**2).reshape(classes, classes)


def _pictures(
    labels: Answers, before: Answers, after: Answers, classes: list[str], best: str
) -> list[Picture]:
    count = len(classes)
    if count > MOST_CLASSES:
        return []
    was, now = (confusion(labels, said, count) for said in (before, after))

    def picture(title: str, caption: str, matrix: NDArray[np.int64]) -> Picture:
        wrong = int(matrix.sum() - np.trace(matrix))
        return Picture(
            title, caption, f"Matrix of {count} by {count} counts, {wrong} off the diagonal.",
            "heatmap",
            {"matrix": matrix.tolist(), "rows": classes, "columns": classes, "xlabel": "said",
             "ylabel": "label"},
            "errors",
        )  # fmt: skip

    pictures = [
        picture(f"Confusion of parent {best}", _worst(was, classes), was),
        picture("Confusion of the child", _worst(now, classes), now),
    ]
    if (was != now).any():
        change = Picture(
            "What changed: the child less the parent",
            "Off the diagonal above nought are errors that the child makes more often.",
            f"Matrix of {count} by {count} changes, from {(now - was).min()} to "
            f"{(now - was).max()}.",
            "heatmap",
            {"matrix": (now - was).tolist(), "rows": classes, "columns": classes,
             "xlabel": "said", "ylabel": "label"},
            "errors",
        )  # fmt: skip
        pictures.append(change)
    return pictures


def _worst(matrix: NDArray[np.int64], classes: list[str]) -> str:
    wrong = matrix - np.diag(np.diag(matrix))
    if not wrong.any():
        return "No error."
    row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
    times = f"{wrong[row, column]} time{'s' * (int(wrong[row, column]) > 1)}"
    pair = f"{classes[row]!r} is taken for {classes[column]!r}"
    return f"{wrong.sum()} errors; most often {pair}: {times}."


def _together(labels: Answers, before: Answers, after: Answers, best: str) -> Finding:
    """Return who is right where the other one errs, and whether that may be chance."""
    from scipy.stats import binomtest

    was, now = before == labels, after == labels
    new, mended, both = (int(x.sum()) for x in (was & ~now, ~was & now, ~was & ~now))
    same = int((~was & ~now & (before == after)).sum())
    told = (
        f"The child errs on {new + both} of {len(labels)} samples, parent {best} on "
        f"{mended + both}: {new} errors are new, {mended} are mended."
    )
    if new + mended:
        p = float(binomtest(new, new + mended).pvalue)
        chance = "may be chance" if p >= 0.05 else "is more than chance"
        told += f" The difference {chance} (exact McNemar test, p = {p:.2g})."
    lines = (
        (f"parent {best} right", int((was & now).sum()), new),
        (f"parent {best} wrong", mended, both),
        ("all", int(now.sum()), int((~now).sum())),
    )
    return Finding(
        f"Errors of parent {best} and of the child",
        f"{len(labels)} test samples; of those that both get wrong, {same} get the same answer.",
        ("samples", "child right", "child wrong", "all"),
        tuple((name, str(a), str(b), str(a + b)) for name, a, b in lines),
        told,
        "errors",
    )


def _pairs(
    labels: Answers, before: Answers, after: Answers, classes: list[str], best: str
) -> tuple[Finding, ...]:
    """Return the pairs of classes whose errors changed most, nothing where none did."""
    counts: dict[tuple[int, int], list[int]] = {}
    for place, said in enumerate((before, after)):
        wrong = said != labels
        for pair in zip(labels[wrong].tolist(), said[wrong].tolist(), strict=True):
            counts.setdefault(pair, [0, 0])[place] += 1
    changed = [(pair, was, now) for pair, (was, now) in counts.items() if was != now]
    changed.sort(key=lambda one: (-abs(one[2] - one[1]), one[0]))
    if not changed:
        return ()
    rows = tuple(
        (f"{classes[label]} taken for {classes[said]}", str(was), str(now), f"{now - was:+d}")
        for (label, said), was, now in changed[:MOST_PAIRS]
    )
    rest = len(changed) - len(rows)
    more = sum(now - was for _, was, now in changed if now > was)
    less = sum(was - now for _, was, now in changed if now < was)
    return (
        Finding(
            "Classes whose confusion changed most",
            f"Errors by pair of classes; {rest} further pairs changed less or as much."
            if rest
            else "Errors by pair of classes, all that changed.",
            ("pair", f"parent {best}", "child", "change"),
            rows,
            f"Over all pairs the child errs {more} times more and {less} times less.",
            "errors",
        ),
    )


def _examples(
    job: BaseJob, labels: Answers, before: torch.Tensor, after: torch.Tensor, classes: list[str]
) -> tuple[Example, ...]:
    was, now = (logits.float().softmax(1).numpy() for logits in (before, after))
    says, says_now = was.argmax(1), now.argmax(1)
    right, right_now = says == labels, says_now == labels
    kinds: dict[Change, tuple[NDArray[np.bool_], NDArray[Any]]] = {
        "new error": (right & ~right_now, now.max(1)),
        "mended": (~right & right_now, was.max(1)),
        "both wrong": (~right & ~right_now, now.max(1)),
    }
    found = []
    for kind, (those, sure) in kinds.items():
        places = np.flatnonzero(those)
        for place in places[np.argsort(-sure[places], kind="stable")][: SHOWN[kind]].tolist():
            text, image = looks(job.data.test.items[place])
            found.append(
                Example(
                    place, classes[labels[place]],
                    f"{classes[says[place]]} ({was[place].max():.0%})",
                    f"{classes[says_now[place]]} ({now[place].max():.0%})", kind, text, image,
                )
            )  # fmt: skip
    return tuple(found)


def clipped(text: str, length: int = LENGTH, *, end: bool = False) -> str:
    """Return one line of at most `length` characters: a text's beginning, or its end."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    return f"…{line[1 - length :]}" if end else f"{line[: length - 1]}…"


def looks(item: Any) -> tuple[str, str]:
    """Return a sample as a report shows it: the beginning of a text, or a small image."""
    from PIL import Image

    if isinstance(item, str):
        return clipped(item), ""
    image = Image.fromarray(np.asarray(item, dtype=np.uint8))
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return "", PNG + base64.b64encode(out.getvalue()).decode()
