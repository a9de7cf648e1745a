"""What a call on another machine answers: that it is done, or its error as JSON values."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from slimfuse import errors
from slimfuse.errors import SlimfuseError


class Fault(Exception):
    """An internal fault on another machine; its traceback there is a note."""


def answer(entry: str, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Call `module:function` with keywords, and return its error as `packed` writes it, or None."""
    module, _, name = entry.partition(":")
    try:
        getattr(import_module(module), name)(**given)
    except Exception as error:
        return packed(error)
    return None


def packed(error: Exception) -> dict[str, Any]:
    """Return an error as JSON values: one of ours whole, any other one with its traceback."""
    if not hasattr(error, "exit_code"):  # SlimfuseError and the exporter's have one
        told = "".join(traceback.format_exception(error))
        return {"kind": type(error).__name__, "what": str(error), "traceback": told}
    parts = {name: getattr(error, name, None) for name in ("where", "got", "allowed", "hint")}
    return {
        "kind": type(error).__name__,
        "code": int(error.exit_code),
        "what": getattr(error, "what", str(error)),
        **{name: value if value is None else str(value) for name, value in parts.items()},
    }


def unpacked(values: Mapping[str, Any]) -> Exception:
    """Return the error that `packed` wrote: of the same class where it is one of `errors`."""
    if "code" not in values:
        fault = Fault(f"{values['kind']}: {values['what']}")
        fault.add_note(values["traceback"])
        return fault
    known = getattr(errors, values["kind"], None)
    kind = known if isinstance(known, type) and issubclass(known, SlimfuseError) else SlimfuseError
    parts = {name: values[name] for name in ("where", "got", "allowed", "hint")}
    error = kind(values["what"], **parts)
    error.exit_code = values["code"]
    return error
