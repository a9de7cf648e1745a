"""The page that runs a folder in the browser, with the real libraries beside it.

SLIMFUSE_NODE_MODULES names a folder made by `npm install --ignore-scripts
@huggingface/transformers`.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import browser
import deployed_folders as folders
import pytest

WEB = Path(__file__).parents[1] / "web"
MODULES = os.environ.get("SLIMFUSE_NODE_MODULES")


def test_no_file_names_another_host():
    for file in WEB.iterdir():
        text = file.read_text().replace("http://127.0.0.1", "")
        assert "://" not in text, file


@pytest.fixture
def site(tmp_path):
    """The page with libraries and models, served from this machine."""
    root = tmp_path / "web"
    shutil.copytree(WEB, root)
    (root / "lib").mkdir()
    js = Path(MODULES) / "@huggingface" / "transformers" / "dist" / "transformers.min.js"
    shutil.copy(js, root / "lib")
    for file in (Path(MODULES) / "onnxruntime-web" / "dist").glob("ort-wasm-simd-threaded*.*"):
        if file.suffix in (".mjs", ".wasm"):
            (root / "lib" / file.name).symlink_to(file)
    folders.colours(root / "models" / "colours")
    folders.states(root / "models" / "causal", "GPT2LMHeadModel")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.mark.interop
@pytest.mark.skipif(
    not MODULES or browser.CHROMIUM is None,
    reason="SLIMFUSE_NODE_MODULES names no folder, or there is no Chromium",
)
def test_a_folder_runs_in_the_browser(site, tmp_path):
    picture = tmp_path / "green.png"
    picture.write_bytes(folders.picture("green", size=(8, 8)))
    with browser.browser(tmp_path / "profile") as page:
        page.look(390, mobile=True)
        page.open(f"{site}?model=colours")
        page.wait("!document.getElementById('ask').hidden")
        page.upload("#file", picture)
        page.wait("!document.getElementById('result').hidden")
        assert page.run("document.getElementById('headline').innerText") == "green"
        assert page.run("document.querySelector('#scores .score').innerText").endswith("%")
        page.open(f"{site}?model=causal")
        page.wait("!document.getElementById('ask').hidden")
        page.type("#text", "the")
        page.run("document.getElementById('send').click()")
        page.wait("!document.getElementById('result').hidden")
        assert page.run("document.getElementById('headline').innerText") == "the old cat dog"
        # the library asks for files that a folder may have, and for a graphics card
        usual = ("Failed to load resource", "wasm", "No available adapters")
        assert [c for c in page.complaints if not any(word in c for word in usual)] == []
        page.open(f"{site}?model=none")
        page.wait("!document.getElementById('error').hidden")
        assert "404" in page.run("document.getElementById('error').innerText")
