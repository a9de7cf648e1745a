"""Whether a picture's data are what its kind is drawn from."""

from __future__ import annotations

from typing import Any

WANTED = {
    "heatmap": ("matrix", "xlabel", "ylabel"),
    "lines": ("series", "xlabel", "ylabel"),
    "bars": ("labels", "values", "ylabel"),
}
"""What each kind can't do without."""


def picture_gaps(kind: str, data: dict[str, Any]) -> list[str]:
    """Return all that is wrong with a picture's plain data, nothing where it can be drawn."""
    if kind not in WANTED:
        return [f"kind {kind!r}; known: {', '.join(WANTED)}"]
    empty: tuple[object, ...] = (None, [], {})
    gaps = [f"{key!r} is missing or empty" for key in WANTED[kind] if data.get(key) in empty]
    if gaps:
        return gaps
    if kind == "heatmap":
        return _matrix_gaps(data)
    if kind == "bars":
        n, m = (len(_list(data[key])) for key in ("labels", "values"))
        return [f"{n} labels, {m} values"] if n != m else _number_gaps("values", data["values"])
    if not isinstance(data["series"], dict):
        return ["'series' is not an object"]
    for name, line in data["series"].items():
        x, y = (_list(line.get(key) if isinstance(line, dict) else None) for key in "xy")
        if len(x) != len(y) or not x:
            gaps.append(f"series {name!r}: {len(x)} x, {len(y)} y")
        gaps += _number_gaps(f"series {name!r}", [*x, *y])
    return gaps


def _matrix_gaps(data: dict[str, Any]) -> list[str]:
    lines = _list(data["matrix"])
    widths = {len(_list(line)) for line in lines}
    if len(widths) != 1 or 0 in widths:
        return ["'matrix' is not a 2-D list"]
    gaps = _number_gaps("matrix", [cell for line in lines for cell in line])
    for key, size in (("rows", len(lines)), ("columns", widths.pop())):
        if key in data and len(_list(data[key])) != size:
            gaps.append(f"{len(_list(data[key]))} names of {size} {key}")
    return gaps


def _number_gaps(key: str, values: Any) -> list[str]:
    numbers = all(isinstance(value, int | float) for value in _list(values))
    return [] if numbers else [f"{key!r} holds what is no number"]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
