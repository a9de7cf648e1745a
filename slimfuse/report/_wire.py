"""Dataclasses to plain JSON values and back, checked: every gap is named with its path."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, Union, cast

from slimfuse.errors import SlimfuseError


def plain(value: object) -> Any:
    """Return `value` as dicts, lists and scalars only; arrays and numpy scalars become Python's.

    Raises: SlimfuseError for a type that JSON can't hold.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors on the CPU
        return plain(value.tolist())
    raise SlimfuseError(
        "a report holds only numbers, words, lists and dicts", got=type(value).__name__
    )


def not_finite(value: object, where: str) -> Iterator[str]:
    """Yield the path of every NaN or infinity in plain data."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} = {value}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from not_finite(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from not_finite(item, f"{where}[{index}]")


def decode(hint: Any, value: Any, where: str, gaps: list[str]) -> Any:
    """Return plain `value` as the type `hint`; append what doesn't fit to `gaps`, with its path."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):  # only `X | None` is used
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else decode(inner, value, where, gaps)
    if origin is Literal:
        return value if value in args else _gap(gaps, where, value, f"one of {', '.join(args)}")
    if is_dataclass(hint):
        return _object(cast(type, hint), value, where, gaps)
    if origin is tuple:
        if not isinstance(value, list):
            return _gap(gaps, where, value, "a list")
        return tuple(decode(args[0], v, f"{where}[{i}]", gaps) for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            return _gap(gaps, where, value, "an object")
        return {k: decode(args[1], v, f"{where}.{k}", gaps) for k, v in value.items()}
    wanted = (int, float) if hint is float else hint
    # bool is an int to Python, but `true` parameters are no parameters
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        return _gap(gaps, where, value, f"a {hint.__name__}")
    return hint(value)


def _object(kind: type, value: Any, where: str, gaps: list[str]) -> Any:
    if not isinstance(value, dict):
        return _gap(gaps, where, value, "an object")
    hints, known = typing.get_type_hints(kind), {f.name: f for f in fields(kind)}
    before = len(gaps)
    gaps += [f"{where}.{key}: unknown key" for key in value if key not in known]
    gaps += [
        f"{where}.{name}: missing"
        for name, f in known.items()
        if name not in value and f.default is MISSING and f.default_factory is MISSING
    ]
    kept = {
        key: decode(hints[key], item, f"{where}.{key}", gaps)
        for key, item in value.items()
        if key in known
    }
    return None if len(gaps) > before else kind(**kept)


def _gap(gaps: list[str], where: str, value: Any, wanted: str) -> None:
    got = repr(value)
    gaps.append(f"{where}: {got[:40] + '…' if len(got) > 40 else got} is not {wanted}")
