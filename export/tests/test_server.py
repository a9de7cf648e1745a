"""The service as a process: its address, its token, its end; and its page in a browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import browser
import deployed_folders as folders
import pytest
from slimfuse_export.cli import main


@contextmanager
def served(folder, *words, **environment):
    """Start the service and yield its process and address."""
    command = [sys.executable, "-m", "slimfuse_export", "serve", str(folder), "--port", "0", *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        said = ""
        while not (found := re.search(r"at (http://\S+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        process.said = said
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def fetch(url, body=None, headers=()):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data, {"content-type": "application/json", **dict(headers)}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def wait_ready(url):
    for _ in range(600):
        try:
            return fetch(f"{url}/ready")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise AssertionError("never ready")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_begun_is_finished_after_the_signal(tmp_path, number):
    folder = folders.sorts(tmp_path / "sorts")
    # an input waits so long for company that the signal comes meanwhile
    with served(folder, "--max-wait-ms", "2000") as (process, url):
        wait_ready(url)
        assert "warning" not in process.said
        found = []
        asking = threading.Thread(target=lambda: found.append(
            fetch(f"{url}/predict", {"inputs": "cat"})
        ))  # fmt: skip
        asking.start()
        while "slimfuse_queue_inputs 1.0" not in metrics(url):
            time.sleep(0.02)
        process.send_signal(number)
        asking.join(60)
        assert found[0]["answers"][0]["label"] == "animal"
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
        with pytest.raises(urllib.error.URLError):
            fetch(f"{url}/health")


def metrics(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        return response.read().decode()


def test_listening_wider_without_a_token_is_warned_of(tmp_path):
    folder = folders.sorts(tmp_path / "sorts")
    with served(folder, "--host", "0.0.0.0") as (process, _):
        assert "warning: everyone who reaches 0.0.0.0" in process.said
    (tmp_path / "token").write_text("secret\n")
    words = ("--host", "0.0.0.0", "--token-file", str(tmp_path / "token"))
    with served(folder, *words) as (process, url):
        assert "warning" not in process.said
        here = url.replace("0.0.0.0", "127.0.0.1")
        wait_ready(here)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(f"{here}/predict", {"inputs": "cat"})
        bearing = {"authorization": "Bearer secret"}
        assert fetch(f"{here}/predict", {"inputs": "cat"}, bearing)["answers"]


def test_bad_usage_exits_2(tmp_path, capsys, monkeypatch):
    folder = folders.sorts(tmp_path / "sorts")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "odd").write_text("two words")
        for words, said in (
            ([tmp_path / "none"], "no such folder"),
            ([folder, "--port", port], "can't be listened on"),
            ([folder, "--host", "192.0.2.1"], "can't be listened on"),
            ([folder, "--max-body-mb", "0"], "limit is not legal"),
            ([folder, "--max-queue", "1"], "shorter than one request"),
            ([folder, "--token-file", tmp_path / "none"], "token can't be read"),
            ([folder, "--token-file", tmp_path / "odd"], "token is not legal"),
        ):
            with pytest.raises(SystemExit) as caught:
                main(["serve", *map(str, words)])
            assert caught.value.code == 2
            assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("slimfuse_export.serving")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit):
        main(["serve", str(folder)])
    assert "slimfuse-export[serve]" in capsys.readouterr().err


RATIO = """(() => {
  const parse = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => { const [r, g, b] = parse(c).map(v => (v /= 255) <= .03928 ? v / 12.92
    : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!/rgba\\(.*, 0\\)/.test(c)) return c; } return 'rgb(255,255,255)'; };
  let worst = 99;
  for (const e of document.querySelectorAll(
    'h1,h2,p,label,button,a,span.label,span.score,textarea')) {
    if (!e.offsetParent || !(e.textContent || e.value)) continue;
    const bar = e.closest('li') && e.closest('li').querySelector('.bar');
    for (const back of [ground(e)].concat(bar ? [getComputedStyle(bar).backgroundColor] : [])) {
      const [a, b] = [light(getComputedStyle(e).color), light(back)].sort((x, y) => y - x);
      worst = Math.min(worst, (a + .05) / (b + .05));
    }
  }
  return worst; })()"""
"""The least contrast of any visible text to what lies behind it, as WCAG 2 computes it."""
NAMED = """[...document.querySelectorAll('input,textarea,button,a,img')].filter(e => e.offsetParent)
  .every(e => e.labels?.length || e.textContent.trim() || e.alt || e.getAttribute('aria-label'))"""
FITS = "document.documentElement.scrollWidth <= innerWidth"


@pytest.mark.interop
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_the_page_asks_the_model_and_shows_bars(tmp_path):
    picture = tmp_path / "blue.png"
    picture.write_bytes(folders.picture("blue", size=(60, 40)))
    with browser.browser(tmp_path / "profile") as page:
        with served(folders.sorts(tmp_path / "texts")) as (_, url):
            wait_ready(url)
            page.open(url)
            page.wait("!document.getElementById('ask').hidden")
            assert page.run("document.querySelector('h1').innerText") == "texts"
            page.type("#text", "the old cat")
            page.run("document.getElementById('send').click()")
            page.wait("!document.getElementById('result').hidden")
            assert page.run("document.getElementById('headline').innerText") == "animal"
            widths = page.run("[...document.querySelectorAll('.bar')].map(b => b.offsetWidth)")
            assert widths[0] > widths[1] > 0
            assert "ms" in page.run("document.getElementById('time').innerText")
            check_looks(page, tmp_path, "texts")
        with served(folders.colours(tmp_path / "images")) as (_, url):
            wait_ready(url)
            page.open(url)
            page.wait("!document.getElementById('ask').hidden")
            page.upload("#file", picture)
            page.wait("!document.getElementById('result').hidden")
            assert page.run("document.getElementById('headline').innerText") == "blue"
            check_looks(page, tmp_path, "images")
        assert page.complaints == []


def check_looks(page, folder, name):
    """Look at the page on a screen and a telephone, in light and dark."""
    shots = Path(os.environ.get("SLIMFUSE_SHOTS", folder))  # where a person wants to look at them
    for width in (1280, 390):
        for dark in (False, True):
            page.look(width, dark=dark, mobile=width < 500)
            assert page.run(RATIO) >= 4.5  # WCAG 2.2, 1.4.3
            assert page.run(NAMED)
            assert page.run(FITS)
            page.shot(shots / f"{name}-{width}-{'dark' if dark else 'light'}.png")


@pytest.mark.interop
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_the_page_asks_for_the_token_and_tells_errors(tmp_path):
    folder = folders.states(tmp_path / "masked", "BertForMaskedLM")
    with (
        browser.browser(tmp_path / "profile") as page,
        served(folder, SLIMFUSE_EXPORT_TOKEN="secret") as (_, url),
    ):
        wait_ready(url)
        page.open(url)
        page.wait("!document.getElementById('access').hidden")
        page.type("#token", "secret")
        page.run("document.querySelector('#access button').click()")
        page.wait("!document.getElementById('ask').hidden")
        page.type("#text", "the cat")
        page.run("document.getElementById('send').click()")
        page.wait("!document.getElementById('error').hidden")
        assert "no mask" in page.run("document.getElementById('error').innerText")
        page.type("#text", " [MASK]")
        page.run("document.getElementById('send').click()")
        page.wait("!document.getElementById('result').hidden")
        assert page.run("document.getElementById('headline').innerText") == "the cat oak"


SCHEMATHESIS = shutil.which(os.environ.get("SLIMFUSE_SCHEMATHESIS", "schemathesis"))
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance",
          "response_schema_conformance")  # fmt: skip


@pytest.mark.slow
@pytest.mark.interop
@pytest.mark.skipif(SCHEMATHESIS is None, reason="SLIMFUSE_SCHEMATHESIS names no program")
@pytest.mark.parametrize("make", [folders.sorts, folders.colours], ids=["texts", "images"])
def test_schemathesis_finds_nothing_that_openapi_does_not_say(tmp_path, make):
    with served(make(tmp_path / "model")) as (_, url):
        wait_ready(url)
        words = ["run", f"{url}/openapi.json", "--checks", ",".join(CHECKS), "--seed", "1",
                 "--max-examples", "60", "--no-color"]  # fmt: skip
        done = subprocess.run([SCHEMATHESIS, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-4000:]
