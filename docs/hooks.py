"""What mkdocs leaves to us: the README as first page, files beside docs/, formulas as MathML."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

HOME = Path(__file__).parent.parent
BESIDE = "repository"
"""Where the site has the files of the repository that pages link to."""
TAKEN = (
    "benchmarks/results/*.md", "benchmarks/*.py", "recipes/**/*.yaml", "recipes/**/*.py",
    "recipes/*.md", "export/README.md", "export/web/README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    "docs/accelerate/*",
)  # fmt: skip
LINK = re.compile(r"`[^`\n]*`|(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")
"""A link's target, or code, which holds none."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the README, the list of decisions, and what lies beside docs/."""
    files.append(File.generated(config, "index.md", content=(HOME / "README.md").read_text()))
    files.append(File.generated(config, "decisions/index.md", content=_decisions()))
    for pattern in TAKEN:
        for path in sorted(HOME.glob(pattern)):
            name = f"{BESIDE}/{path.relative_to(HOME).as_posix()}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    source = page.file.src_uri
    home = posixpath.dirname(_in_repository(source))

    def moved(match: re.Match[str]) -> str:
        if match[2] is None:
            return match[0]
        target = _in_site(posixpath.normpath(posixpath.join(home, match[2])), files)
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(source) or '.')}{match[3]}"

    return LINK.sub(moved, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw without a script."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(html.unescape(match[2]).strip(), display=display))

    return FORMULA.sub(drawn, content)


def _in_repository(uri: str) -> str:
    """Return where a page of the site lies in the repository."""
    if uri == "index.md":
        return "README.md"
    inside, _, rest = uri.partition("/")
    return rest if inside == BESIDE else f"docs/{uri}"


def _in_site(path: str, files: Files) -> str:
    """Return where the site has a file or folder of the repository."""
    if path == "README.md":
        return "index.md"
    uri = path.removeprefix("docs/") if path.startswith("docs/") else f"{BESIDE}/{path}"
    if files.get_file_from_path(uri) is None:
        for name in ("index.md", "README.md"):
            if files.get_file_from_path(f"{uri}/{name}") is not None:
                return f"{uri}/{name}"
        if path.startswith("recipes/"):  # a folder of them
            return f"{BESIDE}/recipes/README.md"
        if path.startswith("docs/"):
            return f"{BESIDE}/{path}"
    return uri


def _decisions() -> str:
    lines = ["# Decisions", "", "What could have gone the other way, and why it did not.", ""]
    for path in sorted((HOME / "docs" / "decisions").glob("*.md")):
        title = path.read_text().splitlines()[0].lstrip("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"
