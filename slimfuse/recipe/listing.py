"""The recipes below a folder as lines to read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from slimfuse.recipe.loading import find_recipes

MANY = 9  # recipes of a subfolder that are still listed one by one


def listed(folder: Path) -> list[tuple[str, str, str, str]]:
    """Return family, name, need and style of every line; a folder of many recipes is one."""
    found = find_recipes(folder)
    homes = {info.path: info.path.parent.relative_to(folder) for info in found}
    many = {home for home, count in Counter(homes.values()).items() if home.parts and count > MANY}
    lines = {}
    for info in sorted(found, key=lambda info: (info.family, info.path)):
        name, about = info.path.relative_to(folder).as_posix(), info.summary
        home = homes[info.path]
        if info.error is not None:
            first, *more = info.error.what.splitlines()
            about = f"{first}; {len(more)} more" if more else first
            lines[name] = (info.family, name, about, "red")
        elif home in many:
            count = list(homes.values()).count(home)
            about = f"{count} recipes: slimfuse recipe list {folder / home}"
            lines[f"{home}"] = (info.family, f"{home.as_posix()}/", about, "")
        else:
            about += " …" if about and about[-1] not in ".!?" else ""
            lines[name] = (info.family, name, about, "")
    return list(lines.values())


def entries(folder: Path) -> list[dict[str, str | None]]:
    """Return every recipe below a folder as plain values; error: of a faulty one."""
    return [
        {
            "path": info.path.as_posix(), "name": info.name, "family": info.family,
            "task": info.task, "summary": info.summary,
            "error": None if info.error is None else str(info.error),
        }
        for info in find_recipes(folder)
    ]  # fmt: skip
