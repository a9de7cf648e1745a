"""How the command line shows its results: tables, and progress with the time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from slimfuse_export.bench import Progress as Tell
from slimfuse_export.folder import CheckResult
from slimfuse_export.inspecting import ModelFacts
from slimfuse_export.latency import BenchResult, Ratio, conditions
from slimfuse_export.measuring.agreement import Agreement
from slimfuse_export.measuring.footprint import Footprint
from slimfuse_export.optimization import Trial
from slimfuse_export.quantization import Quantization


def table(headings: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Return a table whose first column is text and whose other columns are figures."""
    out = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(headings):
        out.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows:
        # file names may hold brackets, which are markup to rich
        out.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return out


def show_checks(console: Console, results: Sequence[CheckResult]) -> None:
    """Print one line for each check, and what went wrong below it."""
    for result in results:
        mark = Text("ok    ", "green") if result.passed else Text("FAILED", "red")
        console.print(mark, Text(f"{result.name}: {result.detail}"), soft_wrap=True)


def show_bench(console: Console, result: BenchResult, ratios: Sequence[Ratio]) -> None:
    """Print the latencies, the ratios to the first model and the conditions."""
    sized = any(row.dims for row in result.latencies)
    headings = ("model", "threads", "batch", *(["dims"] if sized else []),
                "p50 ms", "95 %", "p90 ms", "p99 ms", "rows/s", "calls", "")  # fmt: skip
    rows = [
        (
            row.name,
            str(row.threads),
            str(row.batch),
            *([row.dims] if sized else []),
            f"{row.p50_ms:.3f}",
            "–" if row.p50_low_ms is None else f"{row.p50_low_ms:.3f}–{row.p50_high_ms:.3f}",
            *(f"{ms:.3f}" for ms in (row.p90_ms, row.p99_ms)),
            f"{row.throughput:.4g}",
            str(row.n),
            Text("noisy", "yellow") if row.noisy else "",
        )
        for row in result.latencies
    ]
    console.print(table(headings, rows))
    for ratio in ratios:
        line = (
            f"{ratio.other} is {ratio.speedup:.2f}× as fast as {ratio.base} "
            f"(95 % {1 / ratio.high:.2f}–{1 / ratio.low:.2f}×; "
            f"{conditions(ratio.threads, ratio.batch, ratio.dims)}): {ratio.verdict}"
        )
        console.print(Text(line), soft_wrap=True)
    machine = ", ".join(f"{key} {value}" for key, value in result.environment.items())
    console.print(Text(machine, "dim"), soft_wrap=True)


def show_footprints(console: Console, used: Mapping[tuple[str, int, str], Footprint]) -> None:
    """Print load times and memory, each of a process of its own."""
    if not used:
        return
    headings = ("model", "batch", "dims", "load ms", "first call ms", "peak RSS MB", "its own MB")
    rows = [
        (name, str(batch), dims, f"{one.load_ms:.0f}", f"{one.first_ms:.1f}",
         *(f"{size / 1e6:.0f}" if size is not None else "?"
           for size in (one.peak_rss, one.model_rss)))
        for (name, batch, dims), one in used.items()
    ]  # fmt: skip
    console.print(table(headings, rows))


def show_agreements(console: Console, found: Sequence[Agreement]) -> None:
    """Print the ratios of two measurements, and how far they lie apart."""
    rows = [
        (
            f"{one.other} : {one.base}",
            conditions(one.threads, one.batch, one.dims),
            f"{one.first:.3f}",
            f"{one.second:.3f}",
            f"{one.difference:.1%}",
            Text("agrees", "green") if one.agrees else Text("differs", "red"),
            Text("noisy", "yellow") if one.noisy else "",
        )
        for one in found
    ]
    console.print(table(("ratio", "at", "first", "second", "apart", "", ""), rows))


def show_trials(console: Console, trials: Sequence[Trial]) -> None:
    """Print what was tried, its time over the plain graph's, and why it was kept or not."""
    colours = {"won": "green", "lost": "", "failed": "red", "skipped": "dim"}
    wide = max(len(trial.name) for trial in trials)
    for trial in trials:
        figures = " ".join(f"{ratio.value:.3f}" for ratio in trial.ratios)
        console.print(
            Text(f"{trial.name:{wide}} "), Text(f"{trial.outcome:8}", colours[trial.outcome]),
            Text(f"{figures:6} {trial.reason}"), sep="", soft_wrap=True,
        )  # fmt: skip


def show_attempts(console: Console, done: Quantization, loss: str) -> None:
    """Print every quantised file that was made, and why the mode was chosen."""
    console.print(
        table(
            ("mode", "products float", "bytes", loss, "time", ""),
            [
                (
                    attempt.mode,
                    str(len(attempt.kept_float)),
                    f"{attempt.bytes:,}",
                    f"{attempt.loss:.2%}",
                    f"× {attempt.ratio.value:.2f}" if attempt.ratio else "",
                    "" if attempt.good_enough else Text("too much", "yellow"),
                )
                for attempt in done.attempts
            ],
        )
    )
    console.print(Text(f"mode: {done.reason}"), soft_wrap=True)


def show_facts(console: Console, name: str, facts: ModelFacts) -> None:
    """Print what is in a model file."""
    said = facts.metadata
    rows = {
        "size": f"{facts.bytes:,} bytes, {facts.params:,} numbers stored",
        "stored as": ", ".join(f"{kind} {count:,}" for kind, count in facts.precision.items()),
        "zeros": f"{facts.zeros:.1%} of the weights",
        "inputs": "; ".join(f"{n} {list(dims)}" for n, dims in facts.inputs.items()),
        "outputs": "; ".join(f"{n} {list(dims)}" for n, dims in facts.outputs.items()),
        "operators": ", ".join(f"{op} {count}" for op, count in facts.operators.items()),
        "needs": f"opset {facts.opset}, IR {facts.ir_version}, "
        f"onnxruntime {facts.min_onnxruntime} or newer",
        "made by": "no metadata" if said is None else " → ".join((said.producer, *said.history)),
    }
    if said is not None and said.machine_specific:
        rows["machine"] = "made for the machine it was optimised on"
    if said is not None and said.provenance is not None:
        made_of = said.provenance
        rows["recipe"] = f"sha256 {made_of.recipe} (recipe.lock.yaml)"
        for parent, source in made_of.parents.items():
            licence = made_of.licences.get(parent, "unknown")
            rows[f"parent {parent}"] = f"{source}, licence {licence}"
    console.print(Text(name, "bold"))
    wide = max(map(len, rows))
    for key, value in rows.items():
        console.print(Text(f"  {key:{wide}} {value}"), soft_wrap=True)


@contextmanager
def progress(console: Console) -> Iterator[Tell]:
    """Yield a callback that shows share done and time left, or lines where there's no terminal."""
    if not console.is_terminal:
        said: set[str] = set()

        def say(done: float, label: str) -> None:
            if label not in said:
                said.add(label)
                console.print(Text(f"{done:4.0%} {label}"), soft_wrap=True)

        yield say
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    # no refresh thread: it would take time from the calls being timed
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1.0)

        def move(done: float, label: str) -> None:
            bar.update(task, completed=done, description=label, refresh=True)

        yield move
