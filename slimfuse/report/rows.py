"""What one run measured, as frozen records with a stable JSON form (`report.json`)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from slimfuse.errors import SlimfuseError, UserError
from slimfuse.report._picture import picture_gaps
from slimfuse.report._wire import decode, not_finite, plain

T = TypeVar("T")
SCHEMA = "slimfuse.report/1"
"""Raised by one whenever a key changes its meaning or goes away."""

Stage = Literal["parent", "fused", "finetuned", "sparse", "onnx", "onnx-int8", "baseline"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Change = Literal["new error", "mended", "both wrong", "worse", "better", "nearer", "further"]
"""What became of a sample: of a class, of another answer's error, of a pair's similarity."""
PNG = "data:image/png;base64,"
PictureKind = Literal["heatmap", "lines", "bars"]


@dataclass(frozen=True)
class Figure:
    """One measured figure with its conditions.

    value: in `unit`; a share such as accuracy is a fraction in 0..1 with unit "".
    n: number of samples it was measured on.
    low, high: ends of the 95 % interval, in `unit`.
    """

    value: float
    unit: str = ""
    n: int | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Latency:
    """Percentiles of `n` timed calls, in milliseconds per call of one batch.

    p50_low_ms, p50_high_ms: the 95 % interval of the median, by the calls' order (see
    `slimfuse_export.latency.median_interval`); None in reports before it was kept.
    """

    threads: int
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    n: int
    noisy: bool = False
    p50_low_ms: float | None = None
    p50_high_ms: float | None = None

    @property
    def reach(self) -> tuple[float, float]:
        """The ends of p50's interval, p50 itself where it isn't known."""
        if self.p50_low_ms is None or self.p50_high_ms is None:
            return self.p50_ms, self.p50_ms
        return self.p50_low_ms, self.p50_high_ms


@dataclass(frozen=True)
class Row:
    """One model of the run. `flops` is per sample, `bytes` the weights' size on disk."""

    name: str
    stage: Stage
    metrics: dict[str, Figure]
    params: int
    flops: int
    bytes: int
    latency: tuple[Latency, ...] = ()
    parity_max_abs: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise SlimfuseError(
                "a report row has an unknown stage",
                where=self.name,
                got=self.stage,
                allowed=", ".join(STAGES),
            )

    def at(self, threads: int, batch: int) -> Latency | None:
        """Return the latency under these conditions, None where it wasn't measured."""
        return next((x for x in self.latency if (x.threads, x.batch) == (threads, batch)), None)


@dataclass(frozen=True)
class Speedup:
    """How many times faster the row named `other` is than `base`: time(base) / time(other)."""

    base: str
    other: str
    threads: int
    batch: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class GateResult:
    """One gate of the recipe and what was measured for it, both ready to read.

    missing: by how much it failed, 0 where it held: of the task's metric, else a share of the
    limit.
    """

    metric: str
    rule: str
    measured: str
    passed: bool
    missing: float = 0.0


@dataclass(frozen=True)
class LayerZeros:
    """A pruned layer: its parameter's name and shape, its weights, and how many of them are zero.

    increase: of the mean loss, expected of the last step of pruning by the quadratic model (Fisher
    information); None where the choice used none.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    increase: float | None = None


@dataclass(frozen=True)
class FileSize:
    """A file of the dense or the sparse child: its bytes, and those that zlib (level 6) makes.

    Both as they are exported, before they are told what they are made of (some hundred bytes).
    """

    model: Literal["dense", "sparse"]
    file: str
    bytes: int
    compressed: int


@dataclass(frozen=True)
class Tried:
    """A way to a faster file that was tried: what became of it, what it gave, and why."""

    file: str
    name: str
    outcome: str
    figure: str
    reason: str


@dataclass(frozen=True)
class Picture:
    """One picture as data, drawn later by `figures.draw`.

    caption: what to conclude from it. alt: what is to be seen, for who can't see it.
    data: heatmap {"matrix" (rows, columns), "xlabel", "ylabel"}, with the names of its "rows" and
        "columns" a table of counts;
        lines {"series": {name: {"x", "y"}}, "xlabel", "ylabel"};
        bars {"labels", "values", "ylabel"}. Arrays are turned into lists.
    group: the heading it stands under.

    Raises: SlimfuseError when a key is missing or lengths differ, all gaps at once.
    """

    title: str
    caption: str
    alt: str
    kind: PictureKind
    data: dict[str, Any]
    group: str = "fusion"

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", plain(self.data))
        gaps = list(picture_gaps(self.kind, self.data))
        if gaps:
            raise SlimfuseError(
                "a picture's data don't fit its kind", where=self.title, got="; ".join(gaps)
            )


@dataclass(frozen=True)
class Example:
    """A test sample that parent or child get wrong, or of which they say something else.

    sample: its number in the test set; label: what is right, "" where nothing is; before, after:
    what the parent and the child say; text: its beginning, or of a token what stands around it;
    image: a small PNG as a data URI, "" for neither; other, other_text, other_image: of a pair's
    second sample.

    Raises: SlimfuseError when the image is none, so that a page never loads anything.
    """

    sample: int
    label: str
    before: str
    after: str
    kind: Change
    text: str = ""
    image: str = ""
    other: int | None = None
    other_text: str = ""
    other_image: str = ""

    def __post_init__(self) -> None:
        for image in (self.image, self.other_image):
            if image and not image.startswith(PNG):
                raise SlimfuseError("an example's image is no PNG inside the report",
                                    where=f"sample {self.sample}", got=image[:40],
                                    allowed=f"{PNG}…")  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A table that ends in a decision. columns, rows: texts, the first column names the row.

    conditions: samples, seeds, what the figures are; decision: what follows, in a sentence or two;
    group: the heading it stands under.

    Raises: SlimfuseError when a row is not as long as the columns.
    """

    title: str
    conditions: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    decision: str
    group: str = "why"

    def __post_init__(self) -> None:
        odd = [row[:1] for row in self.rows if len(row) != len(self.columns)]
        if odd or not self.columns:
            raise SlimfuseError(
                "a table's rows don't fit its columns",
                where=self.title,
                got=odd,
                allowed=self.columns,
            )


@dataclass(frozen=True)
class Report:
    """All that one run measured. Row names are unique: speed-ups refer to rows by name.

    settings: the recipe lock. timings: seconds per stage of the run. metric: the one to lead with,
    "" for the first by name. zeros, sizes: the layers of a sparse child, and its files. findings:
    tables of diagnostics, by group. tried: for the ONNX files. examples: errors before and after;
    chosen: how they were chosen, "" of classes.

    Raises: SlimfuseError when two rows share a name or a speed-up names no row.
    """

    name: str
    recipe_path: str
    command: str
    summary: str
    rows: tuple[Row, ...]
    speedups: tuple[Speedup, ...] = ()
    gates: tuple[GateResult, ...] = ()
    pictures: tuple[Picture, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    metric: str = ""
    zeros: tuple[LayerZeros, ...] = ()
    sizes: tuple[FileSize, ...] = ()
    findings: tuple[Finding, ...] = ()
    tried: tuple[Tried, ...] = ()
    examples: tuple[Example, ...] = ()
    chosen: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", plain(self.settings))
        names = Counter(row.name for row in self.rows)
        gaps = [f"{count} rows are named {name!r}" for name, count in names.items() if count > 1]
        gaps += [
            f"a speed-up names {name!r}, which is no row"
            for s in self.speedups
            for name in (s.base, s.other)
            if name not in names
        ]
        if gaps:
            raise SlimfuseError(
                "a report's rows don't fit together",
                where=self.name,
                got="; ".join(gaps),
                allowed=f"rows: {', '.join(names)}",
            )

    @property
    def conditions(self) -> tuple[tuple[int, int], ...]:
        """Every (threads, batch) a latency was measured under, ordered by batch, then threads."""
        return _ordered({(x.threads, x.batch) for row in self.rows for x in row.latency})

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the verdict and every row, compact and self-contained."""
        from slimfuse.report.notebook import fragment

        return fragment(self)

    @property
    def sparsity(self) -> float | None:
        """The share of zeros among the weights of the pruned layers; None without any."""
        total = sum(layer.weights for layer in self.zeros)
        return sum(layer.zeros for layer in self.zeros) / total if total else None

    @property
    def speedup_conditions(self) -> tuple[tuple[int, int], ...]:
        """Every (threads, batch) a speed-up was measured under, in the same order."""
        return _ordered({(s.threads, s.batch) for s in self.speedups})


def to_json(report: object, schema: str = SCHEMA) -> str:
    """Return `report.json`, or another page's figures: sorted keys, every one finite.

    Raises: SlimfuseError naming each figure that is NaN or infinite.
    """
    data = plain(report)
    wrong = list(not_finite(data, "report"))
    if wrong:
        raise SlimfuseError(
            "the report holds figures that are not finite",
            got="; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""),
            hint="leave out what could not be measured, never write NaN",
        )
    return (
        json.dumps(
            {"schema": schema, **data},
            indent=1,
            sort_keys=True,
            allow_nan=False,
            ensure_ascii=False,
        )
        + "\n"
    )


def from_json(text: str) -> Report:
    """Return the report that `to_json` wrote.

    Raises: UserError when it is no report of this schema; every gap is named with its path.
    """
    return decoded(text, Report, SCHEMA)


def decoded(text: str, kind: type[T], schema: str) -> T:
    """Return the record that `to_json` wrote under a schema; raises as `from_json`."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError("this is not JSON", where=where, got=error.msg) from error
    except RecursionError as error:
        raise UserError("this is no report", got="lists within lists without end") from error
    got = data.pop("schema", None) if isinstance(data, dict) else None
    if got != schema:
        raise UserError(
            "this is not a slimfuse report of a schema this version reads",
            got=got,
            allowed=schema,
            hint="run `slimfuse report` of the version that wrote it, or repeat the run",
        )
    gaps: list[str] = []
    try:
        record = decode(kind, data, "report", gaps)
    except SlimfuseError as error:  # its parts are there, but don't fit each other
        raise UserError("the report is damaged", got=error.got, allowed=error.allowed) from error
    if gaps:
        raise UserError("the report is damaged", got="; ".join(gaps))
    assert isinstance(record, kind)
    return record


def _ordered(conditions: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(conditions, key=lambda c: (c[1], c[0])))


def _refuse_constant(word: str) -> None:
    raise UserError("a report holds only finite figures", got=word)
