"""The exceptions a user may meet, each with what, where, got, allowed and the next step."""

from __future__ import annotations


class ExportError(Exception):
    """The files or the machine are at fault, and the user can mend it.

    what: one sentence. where: file, input or option. got, allowed: the offending value and what
    would have been right. hint: the next step. `str()` gives all of them, one a line.
    `exit_code` is the command line's: 2 bad input, 3 a check failed (1 is an internal fault).
    """

    exit_code = 2

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

    exit_code = 3
