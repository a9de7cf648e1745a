"""The exceptions a user may meet, each with what, where, got, allowed and the next step."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """How the command line ends; the same codes as slimfuse's."""

    DONE = 0
    FAULT = 1
    BAD_INPUT = 2
    FAILED = 3
    INTERRUPTED = 130  # 128 + SIGINT, by click


EXIT_CODES = {
    Exit.DONE: "done",
    Exit.FAULT: "internal fault",
    Exit.BAD_INPUT: "bad input or environment",
    Exit.FAILED: "a check failed",
    Exit.INTERRUPTED: "interrupted",
}
"""What each says, as `--help` tells it."""


class ExportError(Exception):
    """The files or the machine are at fault, and the user can mend it.

    what: one sentence. where: file, input or option. got, allowed: the offending value and what
    would have been right. hint: the next step. `str()` gives all of them, one a line.
    `exit_code` is the command line's, see `Exit`.
    """

    exit_code: Exit = Exit.BAD_INPUT

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.allowed, self.hint = what, where, got, allowed, hint
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        fields = (("where", self.where), ("got", self.got), ("allowed", self.allowed))
        lines += [f"  {name + ':':9}{value}" for name, value in fields if value is not None]
        if self.hint:
            lines.append(f"  {'next:':9}{self.hint}")
        return "\n".join(lines)


class CheckFailed(ExportError):
    """A measured check (parity, a finished folder) did not hold."""

    exit_code = Exit.FAILED
