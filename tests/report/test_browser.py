"""Pages in Chromium: no console error, nothing loaded, clean by axe-core, readable on any screen.

Playwright drives the Chromium that is installed (SLIMFUSE_CHROMIUM names another one);
SLIMFUSE_AXE names the file axe.min.js of the npm package axe-core.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from report.fakes import fake_example, fake_finding, fake_report, fake_sweep, quick_report

from slimfuse.report import render_html, render_runs, render_sweep
from slimfuse.report.compare import compare

AXE = os.environ.get("SLIMFUSE_AXE", "")
CHROMIUM = os.environ.get("SLIMFUSE_CHROMIUM") or shutil.which("chromium")
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None  # type: ignore[assignment]
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(sync_playwright is None, reason="playwright is not installed"),
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium; SLIMFUSE_CHROMIUM names one"),
    pytest.mark.skipif(not Path(AXE).is_file(), reason="SLIMFUSE_AXE names no axe.min.js"),
]
WIDTHS, THEMES = (1280, 390), ("light", "dark")
PATIENCE = 600_000  # ms: nothing here is about time
AUDIT = "axe.run(document, {resultTypes: ['violations', 'incomplete']})"  # all rules


def report_page() -> str:
    return render_html(
        fake_report(pictures=2, findings=(fake_finding(),), examples=(fake_example(),))
    )


def comparison_page() -> str:
    other = quick_report(name="another", environment={"cpu": "another"}, settings={"version": 2})
    return render_runs(compare({"runs/a": quick_report(), "runs/b": other}))


PAGES: dict[str, Callable[[], str]] = {
    "report": report_page,
    "comparison": comparison_page,
    "sweep": lambda: render_sweep(fake_sweep()),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE
        )
        yield made
        made.close()


@pytest.fixture(scope="module", params=PAGES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    path.write_text(PAGES[request.param](), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Callable[..., Any]]:
    """Open the page; returns the tab and what it complained of or asked the network for."""
    contexts = []

    def start(**how: Any) -> tuple[Any, list[str]]:
        contexts.append(browser.new_context(**how))
        tab, heard = contexts[-1].new_page(), []
        tab.set_default_timeout(PATIENCE)
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on(
            "request",
            lambda r: None if r.url.startswith(("data:", "file:")) else heard.append(r.url),
        )
        tab.goto(file.as_uri())
        return tab, heard

    yield start
    for context in contexts:
        context.close()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_clean_by_axe_and_fits(opened: Any, width: int, theme: str) -> None:
    # axe is a script, which the page's own policy would refuse
    tab, heard = opened(
        viewport={"width": width, "height": 900}, color_scheme=theme, bypass_csp=True
    )
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    tab.evaluate(Path(AXE).read_text(encoding="utf-8"))
    found = tab.evaluate(AUDIT)
    assert len(found["passes"]) > 10, "axe has looked"
    for kind in ("violations", "incomplete"):  # nothing is left for people to decide, either
        assert [(v["id"], v["nodes"][0]["html"]) for v in found[kind]] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll alone
    assert heard == []


def test_axe_would_complain(browser: Any) -> None:
    tab = browser.new_page()
    tab.set_content("<p style='color: #999'>too pale</p><img src='data:,'>")
    tab.evaluate(Path(AXE).read_text(encoding="utf-8"))
    found = {v["id"] for v in tab.evaluate(AUDIT)["violations"]}
    tab.close()
    assert {"color-contrast", "image-alt"} <= found


def test_the_first_screen_holds_the_verdict(opened: Any) -> None:
    for width, height in ((1280, 900), (390, 844)):
        tab, _ = opened(viewport={"width": width, "height": height})
        for wanted in ("h1", "#summary + *"):
            box = tab.locator(wanted).first.bounding_box()
            assert box is not None and box["y"] + box["height"] <= height


def test_the_keyboard_reaches_all_that_scrolls_or_opens(opened: Any) -> None:
    tab, _ = opened(viewport={"width": 390, "height": 844})
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    box = tab.locator(".skip").bounding_box()
    assert box is not None and box["y"] >= 0, "it shows once it has the focus"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    wanted = tab.locator("main a, main summary, main .scroll").count()
    reached = set()
    for _ in range(wanted + 5):
        tab.keyboard.press("Tab")
        reached.add(
            tab.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)")
        )
    regions = tab.evaluate(
        "[...document.querySelectorAll('main a, main summary, main .scroll')]"
        ".map(one => [...document.querySelectorAll('*')].indexOf(one))"
    )
    assert set(regions) <= reached


def test_each_theme_shows_its_own_pictures(opened: Any) -> None:
    shown = {}
    for theme in THEMES:
        tab, _ = opened(viewport={"width": 1280, "height": 900}, color_scheme=theme)
        shown[theme] = tab.evaluate(
            "[...document.querySelectorAll('picture img')].map(i => i.currentSrc)"
        )
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert len(shown["light"]) > 1
    assert not set(shown["light"]) & set(shown["dark"])


def test_paper_is_light_and_loses_nothing(opened: Any) -> None:
    tab, _ = opened(viewport={"width": 700, "height": 900}, color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate(
        "[...document.querySelectorAll('.scroll')].every(s => s.scrollWidth <= s.clientWidth + 1)"
    ), "no table is cut off"
    assert len(tab.pdf(format="A4")) > 10_000
