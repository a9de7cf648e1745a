"""Where parent and child err: counts by independent means, examples that are what they say."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from slimfuse.pipeline.mistakes import LENGTH, SHOWN, SIDE, confusion, mistakes

CLASSES, N = 5, 97


def made(classes: int = CLASSES, seed: int = 0) -> tuple[Any, dict[str, dict[str, torch.Tensor]]]:
    """Return a job as `mistakes` sees it, and random answers that are right half of the time."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=N)
    items: list[Any] = [rng.integers(256, size=(90, 70, 3), dtype=np.uint8) for _ in range(N)]
    items[::2] = [f"text {i}  with\nmany words " + "x" * 300 for i in range(0, N, 2)]

    def answers() -> dict[str, torch.Tensor]:
        logits = rng.normal(size=(N, classes))
        logits[np.arange(N), labels] += 1.2
        return {"logits": torch.from_numpy(logits)}

    data = SimpleNamespace(
        test=SimpleNamespace(labels=labels, items=items),
        classes=tuple(f"class {i}" for i in range(classes)),
    )
    job = SimpleNamespace(task=SimpleNamespace(by_class=True), data=data)
    return job, {"b": answers(), "finetuned": answers()}


def test_confusion_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    labels, said = rng.integers(7, size=(2, 211))
    assert (confusion(labels, said, 7) == confusion_matrix(labels, said, labels=range(7))).all()


def test_tables_and_pictures_count_the_same_errors() -> None:
    job, evidence = made()
    pictures, (together, pairs), _ = mistakes(job, "b", evidence)
    labels = job.data.test.labels
    wrong = {k: v["logits"].argmax(1).numpy() != labels for k, v in evidence.items()}
    assert f"errs on {wrong['finetuned'].sum()} of {N}" in together.decision
    assert f"parent b on {wrong['b'].sum()}" in together.decision
    cells = [[int(cell) for cell in row[1:]] for row in together.rows]
    assert cells[0][1] == (wrong["finetuned"] & ~wrong["b"]).sum()
    assert cells[1][0] == (wrong["b"] & ~wrong["finetuned"]).sum()
    assert np.array(cells)[:2].sum(0).tolist() == cells[2] and cells[2][2] == N
    was, now, change = (np.array(p.data["matrix"]) for p in pictures)
    assert (now - was == change).all() and was.sum() == now.sum() == N
    for name, before, after, differs in pairs.rows:
        label, said = (int(part[-1]) for part in name.split(" taken for "))
        assert (was[label, said], now[label, said]) == (int(before), int(after))
        assert int(differs) == change[label, said] != 0
    sizes = [abs(int(row[3])) for row in pairs.rows]
    assert sizes == sorted(sizes, reverse=True)


def test_examples_are_what_they_say() -> None:
    job, evidence = made()
    *_, examples = mistakes(job, "b", evidence)
    labels = job.data.test.labels
    for one in examples:
        said = {k: int(v["logits"][one.sample].argmax()) for k, v in evidence.items()}
        assert one.label == f"class {labels[one.sample]}"
        assert one.before.startswith(f"class {said['b']} (")
        assert one.after.startswith(f"class {said['finetuned']} (")
        right = said["b"] == labels[one.sample], said["finetuned"] == labels[one.sample]
        assert one.kind == {(True, False): "new error", (False, True): "mended",
                            (False, False): "both wrong"}[right]  # fmt: skip
        if one.image:
            png = base64.b64decode(one.image.partition(",")[2])
            assert max(Image.open(io.BytesIO(png)).size) == SIDE
        else:
            assert one.text.startswith("text ") and "\n" not in one.text
            assert len(one.text) == LENGTH
    assert {k: sum(e.kind == k for e in examples) for k in SHOWN} == SHOWN


def test_nothing_is_made_up_where_there_are_no_classes_or_no_errors() -> None:
    job, evidence = made()
    job.task.by_class = False
    assert mistakes(job, "b", evidence) == ([], (), ())
    job, evidence = made()
    sure = {"logits": torch.eye(CLASSES)[torch.from_numpy(job.data.test.labels)]}
    pictures, tables, examples = mistakes(job, "b", {"b": sure, "finetuned": sure})
    assert len(pictures) == 2 and len(tables) == 1 and examples == ()
    assert "errs on 0 of" in tables[0].decision and "McNemar" not in tables[0].decision


@pytest.mark.parametrize(("classes", "pictures"), [(40, 3), (41, 0)])
def test_many_classes_are_a_table_only(classes: int, pictures: int) -> None:
    found, tables, _ = mistakes(*_first(made(classes)))
    assert len(found) == pictures and len(tables) == 2 and len(tables[1].rows) <= 8


def _first(given: tuple[Any, Any]) -> tuple[Any, str, Any]:
    return given[0], "b", given[1]
