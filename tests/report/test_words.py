"""The report's words: figures that read well, and the verdict."""

from __future__ import annotations

import dataclasses

import pytest
from report.fakes import fake_report, fake_rows, share

from slimfuse.report import (
    Figure,
    Speedup,
    verdict,
    words,
)
from slimfuse.report.html import tree


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("vit-a", ["vit-a"]),
        ("random-refit", ["random-refit"]),
        ("vit-fashion-mnist-half", ["vit-fashion-", "mnist-half"]),
        ("one word more than fits", ["one word more", "than fits"]),
        ("x" * 20, ["x" * 14, "x" * 6]),
        ("target.hidden_size=0.5", ["target.hidden_", "size=0.5"]),
        ("", [""]),
    ],
)
def test_names_are_folded_where_they_may(name: str, lines: list[str]) -> None:
    assert words.folded(name, 14).split("\n") == lines
    assert "".join(words.folded(name, 14).split()) == name.replace(" ", "")


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (words.count(1_197_834), "1.2 M"),
        (words.count(999_960), "1.0 M"),
        (words.count(512), "512"),
        (words.size(4_100_000), "4.1 MB"),
        (words.size(12), "12 B"),
        (words.measured("accuracy", Figure(0.879)), "87.9 %"),
        (words.measured("eval_accuracy", Figure(0.879)), "87.9 %"),
        (words.measured("accuracy", Figure(87.9, "%")), "87.9 %"),
        (words.measured("perplexity", Figure(12.34)), "12.3"),
        (words.plus_minus("accuracy", share(0.8791)), "87.9 ± 0.6"),
        (words.interval("accuracy", share(0.8791)), "87.3–88.5"),
        (words.interval("accuracy", Figure(0.9)), ""),
        (words.seconds(0.04), "0.0 s"),
        (words.seconds(59.6), "1 min 00 s"),
        (words.seconds(7500), "2 h 05 min"),
        (words.short("encoder.layer.11.output", 12), "encode…utput"),
        (words.times(2.108), "2.1×"),
        (words.times(1.04), "1.04×"),
        (words.number(0.0000021), "2.1e-06"),
        (words.number(12345.6), "12 346"),
    ],
)
def test_figures_read_well(got: str, want: str) -> None:
    assert got == want


def test_verdict_is_built_from_measured_rows() -> None:
    assert verdict(fake_report()) == (
        "64 wide child: 87.9 % (parents 88.4, 88.1) · 3.6× fewer parameters · "
        "2.1× faster at batch 1, 2 threads · INT8 keeps 87.8 %"
    )


def test_verdict_claims_nothing_unmeasured() -> None:
    rows = fake_rows()
    bare = [dataclasses.replace(r, metrics={}, latency=()) for r in rows]
    assert "quality not measured" in verdict(fake_report(rows=tuple(bare), speedups=()))
    assert "speed not compared" in verdict(fake_report(speedups=()))
    assert verdict(fake_report(rows=rows[:2], speedups=())).startswith("No child")
    unclear = Speedup("vit-a", "child.onnx", 2, 1, 1.3, 0.9, 1.8)
    assert "no measurable difference" in verdict(fake_report(speedups=(unclear,)))
    slower = Speedup("vit-a", "child.onnx", 2, 1, 0.5, 0.4, 0.6)
    assert "2.0× slower" in verdict(fake_report(speedups=(slower,)))


def test_verdict_tells_a_loss_from_a_gain() -> None:
    rows = list(fake_rows())
    rows[5] = dataclasses.replace(rows[5], metrics={"accuracy": share(0.71)})
    assert "INT8 falls to 71.0 %" in verdict(fake_report(rows=tuple(rows)))
    for i, value in enumerate((20.1, 21.2, 90.0, 22.3, 22.3, 30.5, 40.0)):
        rows[i] = dataclasses.replace(rows[i], metrics={"perplexity": Figure(value)})
    text = verdict(fake_report(rows=tuple(rows)))
    assert "22.3 perplexity (parents 20.1, 21.2)" in text
    assert "INT8 rises to 30.5" in text


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ({"b": [1, 2], "a": {}}, "a: {}\nb: [1, 2]"),
        ({"p": [{"n": "a", "f": None}, [True]]}, "p:\n  - f: null\n    n: a\n  - - true"),
        ({"layer10": "", "layer2": []}, 'layer2: []\nlayer10: ""'),
        ({}, "{}"),
    ],
)
def test_settings_read_like_yaml(value: dict, want: str) -> None:
    assert tree(value) == want
