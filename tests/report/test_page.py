"""The report's page: one self-contained file that holds every figure."""

from __future__ import annotations

import base64
import dataclasses
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from report.fakes import (
    CONDITIONS,
    fake_example,
    fake_finding,
    fake_pictures,
    fake_report,
    fake_rows,
    quick_report,
    without_intervals,
)

from slimfuse.errors import SlimfuseError
from slimfuse.report import (
    Example,
    GateResult,
    Picture,
    Report,
    Speedup,
    console_table,
    from_json,
    render_html,
    to_json,
    verdict,
    words,
)

LIMIT = 3_000_000  # bytes of a page that still goes through any mail gateway


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
    dark = [a for a in page.all("source") if "dark" in (a["media"] or "")]
    narrow = [a for a in page.all("source") if "max-width" in (a["media"] or "")]
    assert len(dark) == len(page.all("img")) + len(narrow) // 2  # each has its dark twin
    assert narrow, "the plots are drawn for phones, too"
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


def test_the_summary_is_the_first_section(html: str) -> None:
    main = html[html.index('<main id="main"') :]
    first = Page(main[: main.index("</section>")]).text
    for part in (
        verdict(fake_report()), "2 parents", "1.2 M", "3.6× fewer than parent vit-a", "87.9 %",
        "4.8 MB", "3.20 ms", "2.1× faster than parent vit-a", "2 of 3 gates passed",
    ):  # fmt: skip
        assert part in first.replace(" ·", " ·").replace("\n", ""), part
    assert html.index('class="skip" href="#main"') < html.index("<header")
    levels = [int(tag[1]) for tag, _ in Page(html).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))


def test_errors_are_shown_with_their_samples() -> None:
    report = quick_report(findings=(fake_finding(),), examples=(fake_example(),))
    assert from_json(to_json(report)) == report
    page = Page(render_html(report))
    assert "sandal (61%)" in page.text and "1 209 samples" in page.text
    assert {"Sample 17, labelled boot"} <= {img["alt"] for img in page.all("img")}
    with pytest.raises(SlimfuseError, match="no PNG inside"):
        dataclasses.replace(fake_example(), image="https://example.org/x.png")


def test_pairs_and_passages_are_shown_as_they_are_and_escaped() -> None:
    evil = "<b>'s & [?]"
    pair = Example(3, "", "cos 0.11", "cos 0.62", "nearer", evil, other=9, other_text="the other")
    token = Example(4, "' York'", "' York' (61%)", "' Jersey' (9%)", "worse", evil)
    report = quick_report(examples=(pair, token), chosen=f"how {evil} was chosen")
    assert from_json(to_json(report)) == report
    html = render_html(report)
    page = Page(html)
    assert "<b>" not in html and page.text.count(evil) == 3
    for told in ("3 and 9", "the other", "' Jersey' (9%)", "nearer"):
        assert told in page.text
    assert "whose wrong answer is the surest" not in page.text
    bare = Page(render_html(quick_report(examples=(pair,), chosen="x"))).text
    assert "Label" not in bare  # pairs have none


def test_old_reports_without_intervals_of_latencies_are_drawn() -> None:
    new = quick_report()
    old = dataclasses.replace(new, rows=without_intervals(new.rows))
    pages = [Page(render_html(report)) for report in (new, old)]
    assert "6.71–6.81" in pages[0].text and "drawn on thinly to the p90" in pages[0].text
    assert "6.71–6.81" not in pages[1].text and "from the p50 to the p90" in pages[1].text
    text = to_json(old).replace(', "p50_low_ms": null', "")
    lines = [line for line in text.splitlines() if "p50_low_ms" not in line]
    kept = "\n".join(line for line in lines if "p50_high_ms" not in line)
    assert from_json(kept) == old


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
