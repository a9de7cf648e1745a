"""The report as JSON: round trip, and what is refused by path."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from report.fakes import fake_report, fake_rows

from slimfuse.errors import SlimfuseError, UserError
from slimfuse.report import (
    Figure,
    Row,
    Speedup,
    from_json,
    to_json,
)


def test_json_round_trip() -> None:
    report = fake_report()
    again = from_json(to_json(report))
    assert again == report
    assert to_json(again) == to_json(report)


def test_json_has_the_promised_shape() -> None:
    data = json.loads(to_json(fake_report()))
    assert data["schema"] == "slimfuse.report/1"
    row = data["rows"][4]
    assert set(row) >= {"name", "stage", "metrics", "params", "flops", "bytes", "latency"}
    assert set(row["latency"][0]) >= {"p50_ms", "p90_ms", "p99_ms", "threads", "batch"}
    assert row["parity_max_abs"] == 2.1e-6
    assert list(data) == sorted(data)


def test_numpy_scalars_and_tuples_survive() -> None:
    row = Row("a", "parent", {"accuracy": Figure(np.float64(0.5), n=np.int64(7))}, 1, 1, 1)  # type: ignore[arg-type]
    odd = {"threads": (1, np.int32(2)), "layers": range(3)}
    report = fake_report(rows=(row,), speedups=(), settings=odd)
    assert from_json(to_json(report)) == report


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_path(value: float) -> None:
    bad = dataclasses.replace(fake_rows()[0], metrics={"accuracy": Figure(value)})
    with pytest.raises(SlimfuseError, match=r"rows\[0\]\.metrics\.accuracy\.value"):
        to_json(fake_report(rows=(bad, *fake_rows()[1:])))


def test_nan_is_refused_when_read() -> None:
    text = to_json(fake_report()).replace("4312074", "NaN", 1)
    with pytest.raises(UserError, match="finite"):
        from_json(text)


def test_damaged_json_names_every_gap() -> None:
    data = json.loads(to_json(fake_report()))
    del data["rows"][1]["params"]
    data["rows"][2]["stage"] = "smelted"
    data["gates"][0]["passed"] = 1
    data["colour"] = "red"
    with pytest.raises(UserError) as error:
        from_json(json.dumps(data))
    for gap in ("rows[1].params: missing", "rows[2].stage", "gates[0].passed", "report.colour"):
        assert gap in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "slimfuse.report/9"}'])
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        from_json(text)


def test_rows_must_be_told_apart_and_speedups_must_name_them() -> None:
    rows = fake_rows()
    with pytest.raises(SlimfuseError, match="2 rows are named 'vit-a'"):
        fake_report(rows=(rows[0], *rows), speedups=())
    with pytest.raises(SlimfuseError, match="'nobody'"):
        fake_report(speedups=(Speedup("vit-a", "nobody", 1, 1, 2.0, 1.9, 2.1),))
    with pytest.raises(SlimfuseError, match="stage"):
        Row("a", "smelted", {}, 1, 1, 1)  # type: ignore[arg-type]
