"""Command lines as the documentation shows them, held against the real ones without running."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import slimfuse_export.cli
import typer
from pages import HOME

import slimfuse.cli

APPS = {
    "slimfuse": typer.main.get_command(slimfuse.cli.app),
    "slimfuse-export": typer.main.get_command(slimfuse_export.cli.app),
}
OTHERS = (
    ".", "accelerate", "cd", "curl", "exec", "first=$(scontrol", "mkdir", "pip", "python", "ray",
    "torchrun",
)  # fmt: skip
"""What else a page may ask a reader to run."""
INCOMPLETE = ("MissingParameter", "NoArgsIsHelpError", "BadOptionUsage")
"""The parser's errors where something is left out."""


def commands(block: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block, in words, without comments."""
    joined = re.sub(r"\\\n\s*", "", block)
    for line in joined.splitlines():
        for part in re.split(r" && | \| ", line):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def check(words: list[str], *, whole: bool = True) -> None:
    """Raise the parser's error, or AssertionError, where a command isn't one that there is.

    whole: it may not leave out what the command needs, as sentences do.
    """
    if "slimfuse" in words[1:] and words[words.index("slimfuse") - 1] == "-m":
        words = words[words.index("slimfuse") :]  # behind a launcher
    name = words[0].removeprefix(".venv/bin/")
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (HOME / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets), f"no such target: {words}"
    elif name in APPS:
        arguments = [word for word in words[1:] if word != "--debug"]
        try:
            _parse(APPS[name], name, arguments)
        except Exception as error:
            if whole or type(error).__name__ not in INCOMPLETE:
                raise
    else:
        assert name in OTHERS, f"{name}: an unknown command in {words}"


def _parse(command: Any, name: str, arguments: list[str]) -> None:
    if not hasattr(command, "commands"):
        command.make_context(name, list(arguments))
        return
    known = command.commands
    if not arguments:
        command.make_context(name, [])
    assert arguments and arguments[0] in known, f"{name} has no command {arguments[:1]}"
    _parse(known[arguments[0]], arguments[0], arguments[1:])
