"""Tables and prose of a local folder, read strictly: every error names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from slimfuse.errors import DataError

TABLES = (".csv", ".jsonl")
PROSE = ".txt"
SHOWN = 80  # letters of a line
OTHERS = {"\t": "tabs", ";": "semicolons"}
Unit = Literal["line", "paragraph"]


@dataclass(frozen=True)
class Rows:
    """Where a split's rows stand, for messages.

    path: the recipe's data.path; file: that of the split, with the first line of each row.
    """

    split: str
    path: str
    file: Path | None = None
    lines: Sequence[int] = ()

    @property
    def home(self) -> str:
        """The split's file, else the recipe's key."""
        return f"data.path {self.path}" if self.file is None else str(self.file)

    def place(self, row: int) -> str:
        """Return file:line of a row, else its number."""
        if self.file is None:
            return f"{self.home}, split {self.split!r}, row {row + 1}"
        return f"{self.file}:{self.lines[row]}"

    def need_some(self, count: int) -> None:
        """Raise DataError where the split has no row."""
        if not count:
            raise DataError(
                f"split {self.split!r} is empty",
                where=self.home,
                got="no row",
                allowed="at least one",
                hint="fill it, or name another with data.train_split and data.test_split",
            )


def read_file(file: Path, unit: Unit) -> tuple[Any, list[int]]:
    """Return a file as a `datasets.Dataset`, and the first line of each row.

    Every cell of a CSV is text: no guessed numbers, and "NA" is a word. Of JSON Lines a key that
    a line lacks is None. Prose (.txt) has one column, "text", of lines or paragraphs (`unit`), a
    paragraph's lines joined by a space. Raises DataError.
    """
    import datasets

    text = _decoded(file)
    if file.suffix == PROSE:
        cells, lines = _prose(text, unit)
        features = datasets.Features(text=datasets.Value("string"))
        return datasets.Dataset.from_dict({"text": cells}, features=features), lines
    if not text.strip():
        csv_ = file.suffix == ".csv"
        raise DataError(
            "the table is empty",
            where=f"{file}:1",
            got="no line",
            allowed="a line with the columns' names, then rows" if csv_ else "one object a line",
            hint="fill it, or name another with data.train_split and data.test_split",
        )
    if file.suffix == ".jsonl":
        columns, lines = _json_lines(text, file)
        return datasets.Dataset.from_dict({k: _of_one_kind(v) for k, v in columns.items()}), lines
    columns, lines = _csv(text, file)
    features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    return datasets.Dataset.from_dict(columns, features=features), lines


def _decoded(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            "the file is not UTF-8",
            where=f"{file}:{line}",
            got=f"byte 0x{raw[error.start]:02x}",
            allowed="text saved as UTF-8",
            hint=f"iconv -f latin1 -t utf-8 {file.name}, if that is what it was saved as",
        ) from error


def _csv(text: str, file: Path) -> tuple[dict[str, list[str]], list[int]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    rows: list[list[str]] = []
    lines: list[int] = []
    begin = 1
    try:
        for cells in reader:
            if cells and header is None:
                header = _header(cells, f"{file}:{begin}")
            elif cells:
                if len(cells) != len(header or ()):
                    raise _uneven(cells, header or [], f"{file}:{begin}")
                rows.append(cells)
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            "a row of the table can't be read",
            where=f"{file}:{begin}",
            got=str(error),
            hint='a cell that begins with " ends with one, and one inside it is written twice, ""',
        ) from error
    columns = zip(*rows, strict=True) if rows else [()] * len(header or ())
    return {name: list(c) for name, c in zip(header or (), columns, strict=True)}, lines


def _header(cells: list[str], where: str) -> list[str]:
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        raise DataError(
            "two columns have one name",
            where=where,
            got=", ".join(twice),
            hint="give every column a name of its own",
        )
    for mark, name in OTHERS.items():
        if len(cells) == 1 and mark in cells[0]:
            raise DataError(
                f"the columns stand between {name}",
                where=where,
                got=repr(cells[0][:SHOWN]),
                allowed="commas",
                hint="save the table with commas between the cells, or as .jsonl",
            )
    return cells


def _uneven(cells: list[str], header: list[str], where: str) -> DataError:
    return DataError(
        "a row has another number of cells than the header",
        where=where,
        got=f"{len(cells)}: {', '.join(cells)[:SHOWN]}",
        allowed=f"{len(header)}: {', '.join(header)[:SHOWN]}",
        hint='write a text with commas in it between quotes, "one, two"',
    )


def _json_lines(text: str, file: Path) -> tuple[dict[str, list[Any]], list[int]]:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DataError(
                "a line is not a JSON object",
                where=f"{file}:{number}",
                got=line.strip()[:SHOWN],
                allowed='one object a line, {"text": …, …}',
            )
        rows.append(found)
        lines.append(number)
    names = dict.fromkeys(key for row in rows for key in row)
    return {name: [row.get(name) for row in rows] for name in names}, lines


def _of_one_kind(cells: list[Any]) -> list[Any]:
    """Return cells that a column of one type can hold: as text where they are of several."""
    import pyarrow

    try:
        pyarrow.array(cells)
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
        return [c if c is None or isinstance(c, str) else json.dumps(c) for c in cells]
    return cells


def _prose(text: str, unit: Unit) -> tuple[list[str], list[int]]:
    numbered = [(line.strip(), i) for i, line in enumerate(io.StringIO(text, newline=None), 1)]
    if unit == "line":
        found = [(line, i) for line, i in numbered if line]
    else:
        groups = (list(g) for words, g in groupby(numbered, lambda pair: bool(pair[0])) if words)
        found = [(" ".join(line for line, _ in group), group[0][1]) for group in groups]
    return [line for line, _ in found], [i for _, i in found]
