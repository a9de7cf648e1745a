"""The report: JSON round trip, one self-contained page, pictures, the terminal's table."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from slimfuse.errors import SlimfuseError, UserError
from slimfuse.report import (
    Figure,
    GateResult,
    Latency,
    Picture,
    Report,
    Row,
    Speedup,
    accuracy_latency,
    console_table,
    draw,
    figures,
    from_json,
    render_html,
    to_json,
    verdict,
    words,
)
from slimfuse.report._labels import overlap, place
from slimfuse.report.html import tree

LIMIT = 3_000_000  # bytes of a page that still goes through any mail gateway
CONDITIONS = ((1, 1), (2, 1), (1, 8), (2, 8))  # (threads, batch)


def share(value: float, n: int = 10_000) -> Figure:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return Figure(value, "", n, value - half, value + half)


def latencies(p50: float, **noise: bool) -> tuple[Latency, ...]:
    factors = {(1, 1): 1.0, (2, 1): 0.57, (1, 8): 7.3, (2, 8): 4.1}
    return tuple(
        Latency(t, b, p50 * k, p50 * k * 1.08, p50 * k * 1.31, 412, **noise)
        for (t, b), k in factors.items()
    )


def fake_rows() -> tuple[Row, ...]:
    def loss(value: float) -> Figure:
        return Figure(value, "nat", 10_000, value - 0.011, value + 0.011)

    def row(name: str, stage: str, acc: float, nll: float, shape: tuple[int, int], **more) -> Row:
        params, size = shape
        metrics = {"log_loss": loss(nll), "accuracy": share(acc)}
        return Row(name, stage, metrics, params, params * 98, size, **more)  # type: ignore[arg-type]

    big, small = (4_312_074, 17_248_296), (1_197_834, 4_791_336)
    return (
        row("vit-a", "parent", 0.8842, 0.331, big, latency=latencies(11.83)),
        row("vit-b", "parent", 0.8813, 0.338, big, latency=latencies(11.91)),
        row("fused", "fused", 0.7127, 0.842, small, note="one shot, no training"),
        row("64 wide child", "finetuned", 0.8791, 0.345, small),
        row(
            "child.onnx",
            "onnx",
            0.8791,
            0.345,
            small,
            latency=latencies(5.61),
            parity_max_abs=2.1e-6,
        ),
        row(
            "child-int8.onnx",
            "onnx-int8",
            0.8783,
            0.347,
            (1_197_834, 1_402_112),
            latency=latencies(3.92, noisy=True),
            parity_max_abs=0.083,
        ),
        row("from scratch", "baseline", 0.8615, 0.391, small, latency=latencies(5.64)),
    )


def fake_pictures(count: int) -> tuple[Picture, ...]:
    rng = np.random.default_rng(7)
    plan = np.zeros((128, 64))
    plan[np.arange(128), rng.permutation(128) // 2] = 1 / 128
    steps = np.arange(1, 1174)
    kinds = [
        Picture(
            "Transport plan, residual stream",
            "Nearly one to one: the parents' units pair up, little is averaged.",
            "A 128 by 64 plan with one bright cell per row.",
            "heatmap",
            {
                "matrix": plan[np.argsort(plan.argmax(1))],
                "xlabel": "child unit",
                "ylabel": "vit-a unit",
            },
        ),
        Picture(
            "Correlation of heads",
            "Heads of layer 3 find no partner: there the fusion loses most.",
            "Matrix of correlations, strong on the diagonal but for its middle.",
            "heatmap",
            {
                "matrix": np.tanh(rng.normal(size=(12, 9)) + 2 * np.eye(12, 9)),
                "xlabel": "head of vit-b",
                "ylabel": "head of vit-a",
            },
        ),
        Picture(
            "Training loss",
            "The fused start is ahead of the random one by two epochs and stays there.",
            "Two falling curves; the fused one lies lower throughout.",
            "lines",
            {
                "series": {
                    "from fused": {"x": steps, "y": 0.35 + 0.5 * np.exp(-steps / 150)},
                    "from scratch": {
                        "x": steps,
                        "y": 0.39 + 1.9 * np.exp(-steps / 260) + rng.normal(0, 0.02, len(steps)),
                    },
                },
                "xlabel": "step",
                "ylabel": "loss, nat",
            },
            group="finetuning",
        ),
        Picture(
            "Saliency kept per layer",
            "The last layers lose most: a deeper but narrower target would help.",
            "Bars falling from 0.98 at layer 0 to 0.61 at layer 5.",
            "bars",
            {
                "labels": [f"encoder layer {i}" for i in range(6)],
                "values": [0.98, 0.95, 0.9, 0.84, 0.72, 0.61],
                "ylabel": "share of saliency kept",
            },
        ),
    ]
    return tuple(
        dataclasses.replace(kinds[i % 4], title=f"{kinds[i % 4].title} {i // 4 + 1}")
        for i in range(count)
    )


def fake_report(pictures: int | tuple[Picture, ...] = 4, **changes: object) -> Report:
    rows = fake_rows()
    timed = [r for r in rows if r.latency and r.name != "vit-a"]
    speedups = tuple(
        Speedup("vit-a", r.name, t, b, ratio, ratio * 0.97, ratio * 1.04)
        for r in timed
        for t, b in CONDITIONS
        for ratio in [rows[0].at(t, b).p50_ms / r.at(t, b).p50_ms]  # type: ignore[union-attr]
    )
    report = Report(
        name="vit-fashion-half",
        recipe_path="recipes/vit-fashion-half.yaml",
        command="slimfuse compress recipes/vit-fashion-half.yaml --out runs/vit-fashion-half",
        summary="Two ViTs trained on Fashion-MNIST from two seeds, fused to half their width.",
        rows=rows,
        speedups=speedups,
        gates=(
            GateResult("accuracy", "drop ≤ 1.0 pp", "0.5 pp", True),
            GateResult("latency p50", "speed-up ≥ 1.5×", "2.1×", True),
            GateResult("size", "≤ 1.0 MB", "1.4 MB", False),
        ),
        pictures=fake_pictures(pictures) if isinstance(pictures, int) else pictures,
        settings={
            "version": 1,
            "family": "vit",
            "parents": [{"name": "a", "from": "runs/a"}, {"name": "b", "from": "runs/b"}],
            "target": {"hidden_size": 64, "num_attention_heads": 2, "budget": None},
            "bench": {"threads": [1, 2], "batch": [1, 8], "warmup": 10},
            "fuse": {"method": "refit", "ridge": 1e-3, "ot": {}, "untied": False},
        },
        environment={"python": "3.11.7", "cpu": "AMD EPYC 7B13, 2 cores", "onnxruntime": "1.24.1"},
        timings={"load": 1.2, "calibrate": 14.8, "fuse": 22.4, "finetune": 1473.0, "bench": 96.1},
        warnings=("child-int8.onnx: the machine was noisy while it was timed",),
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(fake_report())


# --- JSON ------------------------------------------------------------------------------------


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


# --- words and the verdict --------------------------------------------------------------------


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


# --- the page ---------------------------------------------------------------------------------


def test_page_holds_every_row_and_figure(html: str) -> None:
    text, report = Page(html).text, fake_report()
    for row in report.rows:
        assert row.name in text
        for metric, figure in row.metrics.items():
            assert words.measured(metric, figure) in text
            assert words.interval(metric, figure) in text
        assert words.size(row.bytes) in text and words.count(row.flops) in text
        for x in row.latency:
            assert f"{words.number(x.p90_ms)} / {words.number(x.p99_ms)}" in text
    for s in report.speedups:
        assert f"{s.low:.2f}–{s.high:.2f}" in text
    for picture in report.pictures:
        assert picture.title in text and picture.caption in text
    assert verdict(report) in text
    for part in (report.summary, report.command, *report.warnings, *report.environment.values()):
        assert part in text
    assert "2 of 3 gates passed" in text and "hidden_size: 64" in text


def test_page_is_self_contained(html: str) -> None:
    decoded = "".join(
        base64.b64decode(code).decode() for code in re.findall(r"base64,([\w+/=]+)", html)
    )
    assert decoded.count("<svg") == html.count("base64,")
    for text in (html, decoded):
        links = set(re.findall(r"https?://[^\s\"'<)]*", text))
        assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # xmlns
        assert "<script" not in text and "@import" not in text and "url(//" not in text
    page = Page(html)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    for attrs in page.all("img"):
        assert (attrs["src"] or "").startswith("data:image/svg+xml;base64,")


def test_page_is_accessible(html: str) -> None:
    page = Page(html)
    assert len(page.all("h1")) == 1
    assert all(attrs["alt"] for attrs in page.all("img"))
    alts = {unescape(attrs["alt"] or "") for attrs in page.all("img")}
    assert {p.alt for p in fake_report().pictures} <= alts
    assert all(attrs.get("scope") for attrs in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("source")) == len(page.all("img"))  # each has its dark twin
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    refs = [attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs]
    assert set(refs) <= set(ids)


def test_text_of_users_is_escaped() -> None:
    evil = "<script>alert('x')</script> & $x_$ \"quoted\""
    rows = (dataclasses.replace(fake_rows()[0], name=evil, note=evil), *fake_rows()[1:])
    heat, signed, lines, bars = fake_pictures(4)
    pictures = (
        dataclasses.replace(heat, title=evil, caption=evil, alt=evil, group=evil),
        dataclasses.replace(signed, data=signed.data | {"xlabel": evil, "ylabel": evil}),
        dataclasses.replace(lines, data=lines.data | {"series": {evil: {"x": [1], "y": [2]}}}),
        dataclasses.replace(bars, data={"labels": [evil], "values": [1.0], "ylabel": evil}),
    )
    html = render_html(
        fake_report(
            name=evil,
            summary=evil,
            command=evil,
            recipe_path=evil,
            rows=rows,
            speedups=(Speedup(evil, "child.onnx", 2, 1, 2.0, 1.9, 2.1),),
            gates=(GateResult(evil, evil, evil, False),),
            pictures=pictures,
            settings={evil: [evil, {evil: evil}]},
            environment={evil: evil},
            timings={evil: 1.0},
            warnings=(evil,),
        )
    )
    assert "<script" not in html
    assert Page(html).text.count(evil) > 15  # shown as written, not dropped


def test_what_was_not_measured_is_never_nought() -> None:
    rows = tuple(dataclasses.replace(r, latency=()) for r in fake_rows())
    html = render_html(fake_report(rows=rows, speedups=(), pictures=()))
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    assert table.count("not measured") == len(rows)
    assert "Latency was not measured in this run." in html
    mixed = render_html(fake_report(pictures=()))
    table = mixed[mixed.index("<tbody>") : mixed.index("</tbody>")]
    assert table.count("not measured") == 2 * len(CONDITIONS)  # fused, finetuned


def test_an_almost_empty_report_still_renders() -> None:
    empty = Report("x", "r.yaml", "slimfuse compress r.yaml", "", ())
    html = render_html(empty)
    assert "No child was measured" in html and "No gates were set." in html
    assert console_table(empty).row_count == 0


def test_page_is_the_same_when_read_back_from_json() -> None:
    report = fake_report(pictures=fake_pictures(4)[1:3])
    assert render_html(from_json(to_json(report))) == render_html(report)


def test_twenty_pictures_stay_small() -> None:
    rng = np.random.default_rng(3)
    wide = Picture(
        "w",
        "c",
        "a",
        "heatmap",
        {"matrix": rng.normal(size=(768, 515)), "xlabel": "x", "ylabel": "y"},
    )
    report = fake_report(pictures=0)
    mixed = dataclasses.replace(report, pictures=(*fake_pictures(18), wide, wide))
    assert len(render_html(mixed).encode()) < LIMIT


# --- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_kind_draws_one_small_svg(theme: str) -> None:
    for picture in fake_pictures(4):
        svg = draw(picture, theme)  # type: ignore[arg-type]
        assert svg.startswith("<svg") and svg.endswith("</svg>")
        assert "<metadata" not in svg and len(svg) < 100_000


def test_same_data_give_the_same_bytes() -> None:
    for picture in fake_pictures(4)[::2]:
        assert draw(picture) == draw(picture)


def test_block_means_keep_the_sum_of_each_block() -> None:
    matrix = np.arange(7 * 5, dtype=float).reshape(7, 5)
    small = figures.block_means(matrix, 3)
    assert small.shape == (3, 3)
    assert small[0, 0] == matrix[:3, :2].mean()
    assert small[2, 2] == matrix[6, 4]  # the short block at the corner
    assert figures.block_means(matrix, 7) is matrix


def test_downsampling_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(figures, "_aside", lambda _, text, __: said.append(text))
    ones = np.ones((600, 20))
    draw(Picture("t", "c", "a", "heatmap", {"matrix": ones, "xlabel": "x", "ylabel": "y"}))
    long = {"x": np.arange(5000), "y": np.ones(5000)}
    draw(Picture("t", "c", "a", "lines", {"series": {"s": long}, "xlabel": "x", "ylabel": "y"}))
    assert said == ["each cell: mean of a 3 × 1 block", "each point: mean of up to 10"]


@pytest.mark.parametrize(
    ("kind", "data", "gap"),
    [
        ("heatmap", {"matrix": [[1, 2], [3]], "xlabel": "x", "ylabel": "y"}, "2-D"),
        ("heatmap", {"matrix": [1, 2], "xlabel": "x", "ylabel": "y"}, "2-D"),
        (
            "lines",
            {"series": {"a": {"x": [1], "y": [1, 2]}}, "xlabel": "x", "ylabel": "y"},
            "1 x, 2 y",
        ),
        ("bars", {"labels": ["a"], "values": [1, 2], "ylabel": "y"}, "1 labels, 2 values"),
        ("bars", {"labels": []}, "'ylabel' is missing"),
        ("pie", {}, "pie"),
    ],
)
def test_picture_data_must_fit_their_kind(kind: str, data: dict, gap: str) -> None:
    with pytest.raises(SlimfuseError) as error:
        Picture("t", "c", "a", kind, data)  # type: ignore[arg-type]
    assert gap in str(error.value)


def test_plot_needs_a_point() -> None:
    with pytest.raises(SlimfuseError, match="no row has both"):
        accuracy_latency(fake_rows()[2:4], 1, 1)


def test_awkward_data_draw_without_a_warning() -> None:
    flat = {"matrix": np.zeros((3, 5)), "xlabel": "x" * 300, "ylabel": "模型"}
    draw(Picture("t", "c", "a", "heatmap", flat))
    series = {f"{'层' * 60}{i}": {"x": [1], "y": [i]} for i in range(9)}
    draw(Picture("t", "c", "a", "lines", {"series": series, "xlabel": "x", "ylabel": "y"}))
    for count in (1, 60):
        names = [f"{'encoder.' * 20}{i}" for i in range(count)]
        draw(
            Picture("t", "c", "a", "bars", {"labels": names, "values": [0] * count, "ylabel": "y"})
        )
    rows = [
        dataclasses.replace(r, name=f"{'long name ' * 9}{i}", latency=latencies(1.7 * 30**i))
        for i, r in enumerate(fake_rows()[:3])
    ]
    accuracy_latency(rows, 1, 1)  # spans decades: the axis turns logarithmic


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


def test_labels_do_not_overlap() -> None:
    rng = np.random.default_rng(5)
    points = [(float(x), float(y)) for x, y in rng.uniform(60, 340, size=(23, 2))]
    points[1] = points[0]  # two rows with the same figures
    sizes = [(float(w), 9.0) for w in rng.uniform(20, 60, size=23)]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    boxes = [p.box for p in place(points, sizes, marks, (0, 0, 400, 400))]
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 400 and a[3] <= 400
        assert not any(overlap(a, b) for b in boxes[:i] + marks)


# --- the terminal -----------------------------------------------------------------------------


def printed(report: Report, width: int = 160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(console_table(report, width=width))
        return console.export_text()


def test_console_table_has_a_line_per_row() -> None:
    report = fake_report()
    assert console_table(report).row_count == len(report.rows)
    text = printed(report)
    for word in (
        "87.9 ± 0.6",
        "accuracy %",
        "1.2 M",
        "4.8 MB",
        "2.11× 2.05–2.19",
        "base",
        "batch 1, 2 threads",
    ):
        assert word in text
    fused = next(line for line in text.splitlines() if line.strip().startswith("fused"))
    assert fused.count("–") == len(CONDITIONS) + 1


def test_console_table_cuts_no_figure_on_a_narrow_terminal() -> None:
    text = printed(fake_report(), width=80)
    assert "…" not in text
    for word in ("vit-a", "4.3 M", "17.2 MB", "2.11×", "2.05–2.19", "28.6~"):
        assert word in text


def test_console_table_shows_markup_as_written() -> None:
    rows = (dataclasses.replace(fake_rows()[0], name="[red]a[/x]"), *fake_rows()[1:])
    assert "[red]a[/x]" in printed(fake_report(rows=rows, speedups=()))
