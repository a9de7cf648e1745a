"""The exceptions a user may meet, each with what, where, got, allowed and the next step."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """How the command line ends."""

    DONE = 0
    FAULT = 1
    BAD_INPUT = 2
    FAILED = 3
    INTERRUPTED = 130  # 128 + SIGINT
    TERMINATED = 143  # 128 + SIGTERM


EXIT_CODES = {
    Exit.DONE: "done",
    Exit.FAULT: "internal fault",
    Exit.BAD_INPUT: "bad input or environment",
    Exit.FAILED: "a check or gate failed",
    Exit.INTERRUPTED: "interrupted",
    Exit.TERMINATED: "ended by SIGTERM",
}
"""What each says, as `--help` tells it."""


class SlimfuseError(Exception):
    """Base of every error raised on purpose; carries the exit code of the command line."""

    exit_code: int = Exit.FAULT

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
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


class UserError(SlimfuseError):
    """The input or the machine is at fault, and the user can mend it."""

    exit_code = Exit.BAD_INPUT


class RecipeError(UserError):
    """The recipe is malformed; `where` is file:line."""


class ParentError(UserError):
    """A parent can't be loaded, or the parents don't fit each other."""


class ShapeError(UserError):
    """The target's shape is not legal for its class."""


class DataError(UserError):
    """A data set can't be loaded or doesn't fit the model."""


class StorageError(UserError):
    """The run folder can't be written, or another process holds it."""


class CheckFailed(SlimfuseError):
    """A measured check (parity, strict load, a gate) did not hold."""

    exit_code = Exit.FAILED


class Terminated(BaseException):
    """SIGTERM has come: what is under way is saved where it can be, and the process ends.

    Like KeyboardInterrupt no Exception, so that nothing that mends errors takes it for one.
    """

    exit_code = Exit.TERMINATED


def first_line(error: BaseException) -> str:
    """Return an error of a library as one short line: its kind and the first line it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}".rstrip(": ")
