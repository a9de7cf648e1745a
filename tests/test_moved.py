"""What tasks without classes show of errors: the furthest moves, found by independent means."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_text
import torch
from torch import Tensor, nn

from slimfuse.data import Split
from slimfuse.pipeline.mistakes import LENGTH
from slimfuse.pipeline.moved import SHOWN, moved
from slimfuse.pipeline.passages import GAP, find_passages
from slimfuse.tasks import (
    CausalLanguageModelling,
    LanguageTask,
    MaskedLanguageModelling,
    SentenceEmbedding,
    TextClassification,
    ask,
)

N = 61
GENERATOR = torch.Generator().manual_seed(0)


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=GENERATOR).double()


def job_of(task: Any, **more: Any) -> Any:
    items = [f"text {i}\nwith <b>{'many words ' * 30}" for i in range(N)]
    data = SimpleNamespace(test=SimpleNamespace(items=items), classes=("x", "y", "z"))
    return SimpleNamespace(task=task, data=data, **more)


def test_numbers_whose_error_changed_most() -> None:
    task = TextClassification().of(SimpleNamespace(kind="regression"))  # type: ignore[arg-type]
    labels, was, now = draw(3, N)
    evidence = {"b": {"logits": was[:, None], "labels": labels},
                "finetuned": {"logits": now[:, None], "labels": labels}}  # fmt: skip
    (table,), examples, chosen = moved(job_of(task), "b", evidence)
    change = ((now - labels).abs() - (was - labels).abs()).numpy()
    order = np.argsort(change)
    assert [e.sample for e in examples if e.kind == "worse"] == order[::-1][:6].tolist()
    assert [e.sample for e in examples if e.kind == "better"] == order[:3].tolist()
    assert table.rows[-1][1:3] == (str(N), f"{change.mean():+.3g}")
    assert int(table.rows[0][1]) == (change > 0).sum() and f"Of {N} test samples" in chosen
    assert all(e.text.startswith("text ") and len(e.text) == LENGTH for e in examples)


def test_labels_that_are_missing_or_too_many() -> None:
    task = TextClassification().of(SimpleNamespace(kind="multi"))  # type: ignore[arg-type]
    labels = (draw(N, 3) > 0).double()
    evidence = {k: {"logits": draw(N, 3), "labels": labels} for k in ("b", "finetuned")}
    (table,), examples, _ = moved(job_of(task), "b", evidence)
    wrong = {k: ((v["logits"] > 0) != (labels > 0)).sum(1) for k, v in evidence.items()}
    for one in examples:
        change = int(wrong["finetuned"][one.sample] - wrong["b"][one.sample])
        assert change > 0 if one.kind == "worse" else change < 0
        said = [c for c, on in zip("xyz", evidence["b"]["logits"][one.sample] > 0, strict=True)
                if on]  # fmt: skip
        assert one.before == (", ".join(said) or "none")
    assert sum(int(row[1]) for row in table.rows[:-1]) == N


@pytest.mark.parametrize("teachers", [1, 2])
def test_pairs_whose_cosine_moved_most(teachers: int) -> None:
    named = [SimpleNamespace(name=n, weight=w) for n, w in (("a", 1.0), ("b", 3.0))][:teachers]
    job = job_of(SentenceEmbedding(), teachers=named)
    evidence = {k: {"embeddings": draw(N, d)} for k, d in (("a", 7), ("b", 9), ("finetuned", 5))}
    (table,), examples, chosen = moved(job, "a", evidence)

    def cosine(name: str, one: int, other: int) -> float:
        rows = evidence[name]["embeddings"]
        return float(torch.cosine_similarity(rows[one], rows[other], dim=0))

    total = sum(t.weight for t in named)
    for one in examples:
        assert one.other is not None and one.other_text.startswith(f"text {one.other} ")
        was = sum(t.weight / total * cosine(t.name, one.sample, one.other) for t in named)
        now = cosine("finetuned", one.sample, one.other)
        assert (one.before, one.after) == (f"cos {was:.3f}", f"cos {now:.3f}")
        assert (now > was) == (one.kind == "nearer")
    assert len(examples) == SHOWN["nearer"] + SHOWN["further"]
    assert table.rows[-1][1] == str(N // 2) and f"Of {N // 2} disjoint" in chosen
    assert ("weighted mean" in chosen) == (teachers == 2)


def test_where_nothing_moved_nothing_is_shown() -> None:
    rows = {"embeddings": draw(N, 5)}
    named = [SimpleNamespace(name="a", weight=1.0)]
    same = {"a": rows, "finetuned": rows}
    (table,), examples, chosen = moved(job_of(SentenceEmbedding(), teachers=named), "a", same)
    assert examples == () and chosen == ""
    assert [row[:2] for row in table.rows] == [("the same", "30"), ("all", "30")]


class Lookup(nn.Module):
    """Logits that depend on the token at the place alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, input_ids: Tensor, **_: Tensor) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


@pytest.mark.parametrize("task", [CausalLanguageModelling(), MaskedLanguageModelling()])
@pytest.mark.parametrize("joins", [True, False])
def test_tokens_whose_loss_changed_most(task: LanguageTask, joins: bool, tmp_path: Path) -> None:
    tokenizer = tiny_text.tokenizer(["[MASK]"])
    tokenizer.mask_token = "[MASK]"
    size = len(tokenizer)
    models = {name: Lookup(draw(size, size).float()) for name in "ac"}
    words = [w for group in tiny_text.WORDS.values() for w in group]
    texts = [" ".join(words[(i * k) % 15] for k in range(1, 4 + i % 9)) for i in range(40)]
    task = task.packing(joins).truncating(11)
    samples = task.samples(Split(texts, np.zeros(40, dtype=np.int64)), tokenizer)
    evidence = {
        name: ask(lambda batch, m=model: m(**batch.arguments).logits, task, samples, what="x")
        for name, model in (("a", models["a"]), ("finetuned", models["c"]))
    }
    parent = SimpleNamespace(name="a")
    family = SimpleNamespace(load=lambda path: models[str(path)])
    made: list[dict[str, Any]] = []

    def stage(_name: str, inputs: dict[str, Any], build: Any) -> Any:
        made.append(inputs)
        build(tmp_path)
        return SimpleNamespace(path=tmp_path)

    stages: Any = SimpleNamespace(
        job=SimpleNamespace(task=task, parents=[parent], family=family, processor=tokenizer),
        base={}, parent=lambda _: ("a", "key-a"), samples=lambda _: samples,
        store=SimpleNamespace(stage=stage),
    )  # fmt: skip
    child: Any = SimpleNamespace(path="c", key="key-c")
    examples = find_passages(stages, "a", child, evidence)
    assert made == [{"parent": "key-a", "child": "key-c"}]
    loss = {k: (v["nll"] / v["tokens"].clamp_min(1)).numpy() for k, v in evidence.items()}
    change = loss["finetuned"] - loss["a"]
    assert [e.sample for e in examples[:6]] == np.argsort(-change, kind="stable")[:6].tolist()
    assert {e.kind for e in examples} == {"worse", "better"}
    for one in examples:
        inputs, labels = task.examples(samples, torch.tensor([one.sample]))
        found = []
        for place in (labels[0] >= 0).nonzero()[:, 0].tolist():
            seen, wanted = int(inputs.arguments["input_ids"][0, place]), int(labels[0, place])
            was, now = (-m.table.weight[seen].log_softmax(0)[wanted] for m in models.values())
            found.append((float(now - was), wanted, seen))
        _, wanted, seen = (max if one.kind == "worse" else min)(found)
        assert one.label == repr(tokenizer.decode([wanted])) and GAP in one.text
        guess = repr(tokenizer.decode([int(models["a"].table.weight[seen].argmax())]))
        assert one.before.startswith(f"{guess} (")
        if task.ahead:
            assert one.text.removesuffix(f" {GAP}").endswith(tokenizer.decode([seen]))
    job = job_of(task)
    (table,), shown, chosen = moved(job, "a", evidence, examples)
    assert shown == examples and task.sample in chosen
    assert table.rows[-1][2] == f"{change.mean():+.3g}"
