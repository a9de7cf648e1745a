"""Tokens of the test set whose loss changed most from a parent to the child, in their context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimfuse.batch import Batch, token_mask
from slimfuse.pipeline.mistakes import LENGTH, clipped
from slimfuse.pipeline.moved import furthest, mean_losses
from slimfuse.pipeline.stages import BaseStages
from slimfuse.report import Example
from slimfuse.store import Stage
from slimfuse.tasks import Evidence, LanguageTask, answers_of
from slimfuse.tasks.language import IGNORED, ROWS
from slimfuse.tasks.texts import IDS

FILE = "passages.json"
GAP = "[?]"
"""What stands where a token was asked for."""
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Told:
    """What a model says of the tokens asked for in one sample, each (r,).

    loss: −log p of the right one, in nats; said: the likeliest token; sure: its probability.
    """

    loss: Tensor
    said: Tensor
    sure: Tensor


def find_passages(
    stages: BaseStages, best: str, child: Stage, evidence: Mapping[str, Evidence]
) -> tuple[Example, ...]:
    """Return examples of a language model's tokens, kept as a stage; nothing of other tasks.

    Of the samples whose mean loss rose or fell most, by the evidence of parent `best` and of the
    child (`finetuned`): both are asked again for these few, since evidence has sums alone.
    """
    job = stages.job
    if not isinstance(job.task, LanguageTask):
        return ()
    home, key = stages.parent(next(p for p in job.parents if p.name == best))

    def build(folder: Path) -> None:
        change = mean_losses(evidence["finetuned"]) - mean_losses(evidence[best])
        chosen = list(furthest(change, ("worse", "better")))
        places = [place for _, place in chosen]
        was, now = (_ask(stages, path, places) for path in (home, child.path))
        found = [
            _example(stages, kind, place, before, after)
            for (kind, place), before, after in zip(chosen, was, now, strict=True)
        ]
        told = json.dumps([asdict(one) for one in found], ensure_ascii=False, indent=1)
        (folder / FILE).write_text(told, encoding="utf-8")

    inputs = stages.base | {"parent": key, "child": child.key}
    made = stages.store.stage("passages", inputs, build)
    kept = json.loads((made.path / FILE).read_text(encoding="utf-8"))
    return tuple(Example(**one) for one in kept)


def _ask(stages: BaseStages, path: Path, places: list[int]) -> list[Told]:
    """Return what a model says of some samples of the test set, one after the other."""
    model: nn.Module = stages.job.family.load(path)
    answer = answers_of(model, stages.job.task.output)
    found = []
    for place in places:  # one by one: logits over a vocabulary are large
        inputs, labels = _sample(stages, place)
        with torch.no_grad():
            rows, wanted = stages.job.task.rows(answer(inputs), inputs, labels)
        parts = [_told(*part) for part in zip(rows.split(ROWS), wanted.split(ROWS), strict=True)]
        found.append(Told(*(torch.cat(column) for column in zip(*parts, strict=True))))
    return found


def _told(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    likely = rows.float().log_softmax(1)
    sure, said = likely.max(1)
    return -likely.gather(1, wanted[:, None])[:, 0], said, sure.exp()


def _sample(stages: BaseStages, place: int) -> tuple[Batch, Tensor]:
    return stages.job.task.examples(stages.samples("test"), torch.tensor([place]))


def _example(stages: BaseStages, kind: Any, place: int, before: Told, after: Told) -> Example:
    """Return the token of a sample whose loss changed most in the direction of its mean."""
    inputs, labels = _sample(stages, place)
    change = after.loss - before.loss
    row = int((change if kind == "worse" else -change).argmax())
    spot = int((labels[0] != IGNORED).nonzero()[row])
    task, tokenizer = stages.job.task, stages.job.processor
    assert isinstance(task, LanguageTask)
    ids, mask = inputs.arguments[IDS][0], token_mask(inputs)
    if mask is not None:
        ids = ids[mask[0]]
    wanted = int(labels[0, spot])

    def said(model: Told) -> str:
        likeliest, right = int(model.said[row]), float((-model.loss[row]).exp())
        told = f"{_token(tokenizer, likeliest)} ({_share(float(model.sure[row]))})"
        return told if likeliest == wanted else f"{told}; the right one {_share(right)}"

    context = _context(tokenizer, ids, spot + task.ahead, whole=not task.ahead)
    return Example(place, _token(tokenizer, wanted), said(before), said(after), kind, context)


def _context(tokenizer: Any, ids: Tensor, spot: int, *, whole: bool) -> str:
    """Return what stands before a token, and behind it where models see that, too."""
    before = tokenizer.decode(ids[:spot].tolist())
    if not whole:
        return f"{clipped(before, LENGTH, end=True)} {GAP}".strip()
    behind = tokenizer.decode(ids[spot + 1 :].tolist())
    half = LENGTH // 2
    return f"{clipped(before, half, end=True)} {GAP} {clipped(behind, half)}".strip()


def _token(tokenizer: Any, number: int) -> str:
    """Return a token in quotes, in one piece with its blanks."""
    return repr(tokenizer.decode([number])).replace(" ", NO_BREAK)


def _share(share: float) -> str:
    if share < 0.001:
        return "< 0.1%"
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
