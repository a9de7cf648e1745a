"""Pages that repeat what the code says: the recipe reference, messages, exit codes, the site."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from pages import HOME, PAGES
from ruamel.yaml import YAML

from slimfuse import errors

DOCS = HOME / "docs"


def test_the_recipe_reference_is_the_schemas() -> None:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text() == reference.page(), "run `make docs` and commit the page"


def test_messages_of_the_troubleshooting_page_are_raised_somewhere() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    table = page[page.index("## Messages") : page.index("## A poor result")]
    rows = [row for row in table.splitlines() if row.startswith("|")]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row.split("|")[1])]
    sources = "".join(path.read_text() for path in sorted((HOME / "slimfuse").rglob("*.py")))
    flat = re.sub(r'"\s*f?"', "", sources)  # literals over several lines
    assert len(messages) > 10
    assert [message for message in messages if message not in flat] == []


def test_exit_codes_are_those_of_the_errors() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)}
    kinds = [
        kind for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, BaseException)
    ]  # fmt: skip
    assert codes == {kind.exit_code for kind in kinds if hasattr(kind, "exit_code")} | {0, 130}


def test_the_readme_takes_two_minutes() -> None:
    assert len((HOME / "README.md").read_text().splitlines()) <= 110


def test_the_site_has_every_page_and_fetches_nothing() -> None:
    config = YAML(typ="safe").load(HOME / "mkdocs.yml")
    told = re.findall(r"([\w-]+\.md)", str(config["nav"]))
    assert {path.name for path in PAGES if path.name != "README.md"} <= set(told)
    assert config["theme"]["font"] is False and "extra_javascript" not in config
    project = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]
    wanted = {re.split("[><=]", name)[0] for name in project["optional-dependencies"]["docs"]}
    pinned = {
        line.partition("==")[0] for line in Path(HOME / "constraints.txt").read_text().split()
    }
    assert wanted <= pinned


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_begin_with_one_title(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    assert text.startswith("# ") and len(re.findall(r"^# ", text, re.M)) == 1
