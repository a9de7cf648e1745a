"""Every fenced block, every command and every link of the README and of docs/*.md holds."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import check, commands
from deployed_folders import colours
from pages import FENCE, HOME, PAGES, README, Fenced, fenced, links
from PIL import Image
from ruamel.yaml import YAML
from slimfuse_export import save_reference
from slimfuse_export.references import reference_cases

import slimfuse
from slimfuse.errors import RecipeError
from slimfuse.pipeline import Run
from slimfuse.recipe import load_recipe
from slimfuse.report import Figure, Report, Row, to_json

BLOCKS = [block for page in PAGES for block in fenced(page)]
LANGUAGES = ("sh", "python", "yaml", "text")
PARTS = (
    "target",
    "fuse",
    "finetune",
    "sparsify",
    "diagnose",
    "export",
    "bench",
    "gates",
    "runtime",
)


def mine() -> str:
    """Return the README's recipe."""
    (recipe,) = [block.text for block in fenced(README) if block.language == "yaml"]
    return recipe


def load(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    load_recipe(file)


def with_parts(parts: dict[str, object], tmp_path: Path) -> None:
    """Read the README's recipe with some of its parts replaced."""
    yaml = YAML(typ="safe")
    recipe = {**yaml.load(mine()), **parts}
    with (tmp_path / "mine.yaml").open("w") as file:
        yaml.dump(recipe, file)
    load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_block_is_closed_and_says_its_language(page: Path) -> None:
    assert not re.search(r"^`{3}", FENCE.sub("", page.read_text()), re.M), "a fence stays open"
    for block in fenced(page):
        assert block.language in LANGUAGES, f"{block}: {block.language!r}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_recipes_are_valid(block: Fenced, tmp_path: Path) -> None:
    if "version:" in block.text:
        load(block.text, tmp_path)
    else:
        with_parts(YAML(typ="safe").load(block.text), tmp_path)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=str)
def test_commands_exist_with_their_options(block: Fenced) -> None:
    if block.text.startswith("#!"):  # a script for Slurm: its last command is ours
        block = Fenced(block.page, block.line, "sh", block.text[block.text.index("accelerate") :])
        block = Fenced(block.page, block.line, "sh", block.text.rstrip().removesuffix('"'))
    for words in commands(block.text):
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_sentences_exist(page: Path) -> None:
    sentences = FENCE.sub("", page.read_text())
    for code in re.findall(r"`((?:slimfuse|slimfuse-export|make|torchrun) [^`…]+)`", sentences):
        for words in commands(code):
            check(words, whole=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        assert "://" in link or not link or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ["recipes", "finetuning", "sparsifying", "deploying"])
def test_settings_in_tables_are_valid(page: str, tmp_path: Path) -> None:
    found = 0
    for row in (HOME / "docs" / f"{page}.md").read_text().splitlines():
        parts = {}
        for code in re.findall(r"`(\w+: [^`…]+)`", row):
            key = code.partition(":")[0]
            if page == "finetuning" and key not in PARTS:
                key, code = "finetune", f"finetune: {{{code}}}"
            if key in PARTS:
                parts |= YAML(typ="safe").load(code)
        if parts:
            with_parts(parts, tmp_path)
            found += len(parts)
    assert found or page == "deploying"


def test_a_misspelt_key_of_a_page_would_be_found(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown key"):
        with_parts({"finetune": {"epoch": 3}}, tmp_path)
    with pytest.raises(Exception, match="No such option: --wide"):
        check(["slimfuse", "compress", "mine.yaml", "--wide", "0.5"])
    with pytest.raises(AssertionError, match="no command"):
        check(["slimfuse", "squeeze", "mine.yaml"])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' Python reads: a recipe, pictures, a finished model."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(mine())
    for label in "01":
        folder = Path("photos", "test", label)
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(folder / "0.png")
    model = colours(Path("runs/mine/model").absolute())
    save_reference(model / "onnx" / "samples.npz", reference_cases(model))
    row = Row("onnx", "onnx", {"accuracy": Figure(0.9)}, 10, 10, 10)
    report = Report("mine", "mine.yaml", "slimfuse compress mine.yaml", "", (row,))
    Path("runs/mine/report.json").write_text(to_json(report))

    def compress(recipe: str, *, overrides: tuple[str, ...] = ()) -> Run:
        load_recipe(Path(recipe), overrides)
        return Run(model.parent, model, report)

    def plan(recipe: str) -> SimpleNamespace:
        load_recipe(Path(recipe))
        return SimpleNamespace()

    monkeypatch.setattr(slimfuse, "compress", compress, raising=False)
    monkeypatch.setattr(slimfuse, "plan", plan, raising=False)
    return tmp_path


PYTHON = {page: [b for b in fenced(page) if b.language == "python"] for page in PAGES}


@pytest.mark.parametrize("page", [p for p, found in PYTHON.items() if found], ids=lambda p: p.name)
def test_python_can_be_read(page: Path) -> None:
    for block in PYTHON[page]:
        ast.parse(block.text, str(block))


def test_python_runs_in_its_pages_order(world: Path) -> None:
    """A tutorial's files are run by its own test, which is slow."""
    run = 0
    for page, found in PYTHON.items():
        names: dict[str, object] = {}
        for block in found if not page.name.startswith("tutorial-") else ():
            exec(compile(block.text, str(block), "exec"), names)
            run += 1
    assert run
