"""Which graph is the fastest that still gives the same, by measurement."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from slimfuse_export._files import replacing
from slimfuse_export.bench import Progress, bench
from slimfuse_export.errors import ExportError
from slimfuse_export.folder import MODEL, OPTIMIZED
from slimfuse_export.graph import check_dims, check_graph, load_model, model_bytes, save_model
from slimfuse_export.latency import BenchResult, Ratio
from slimfuse_export.metadata import CONTRIB, STANDARD, stamp
from slimfuse_export.optimization.candidates import Candidate, NotTried, candidates, model_config
from slimfuse_export.parity import Case, check_cases
from slimfuse_export.references import reference_cases, rows_of

PLAIN = "plain"
MIN_GAIN = 0.02
Outcome = Literal["won", "lost", "failed", "skipped"]


@dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    reason: why it won, lost, failed or was skipped. ratios: of its time to the plain graph's, one
    for each number of threads and batch size. max_abs: its largest |Δ| from the reference.
    """

    name: str
    outcome: Outcome
    reason: str
    portable: bool = True
    ratios: tuple[Ratio, ...] = ()
    max_abs: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Optimized:
    """All that was tried; winner: the name of what was written to `written`, None for neither."""

    trials: tuple[Trial, ...]
    winner: str | None
    written: Path | None
    environment: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, fit for JSON, without the folder's path."""
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "winner": self.winner,
            "written": self.written.name if self.written else None,
            "environment": dict(self.environment),
        }


@dataclass(frozen=True)
class _Rules:
    """How candidates are judged, see `optimize_folder`."""

    cases: Sequence[Case]
    atol: float
    rtol: float
    min_gain: float
    timing: Mapping[str, Any]


def optimize_folder(
    folder: str | os.PathLike[str],
    *,
    replace: bool = False,
    dims: Mapping[str, int] | None = None,
    threads: Sequence[int] = (1,),
    batch: Sequence[int] = (1,),
    min_seconds: float = 3.0,
    min_runs: int = 100,
    min_gain: float = MIN_GAIN,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Optimized:
    """Try other graphs of the folder's model; keep the fastest where it surely wins.

    A candidate must be accepted by onnx.checker, use standard or com.microsoft operators only,
    keep inputs and outputs, and agree with onnx/samples.npz (with the plain graph on random inputs
    where there is none). All that do are timed in turns with the plain graph; one wins where it is
    surely faster (`Ratio.verdict`) and the gain is at least `min_gain`, at every number of threads
    and batch size. The best is timed once more, alone with the plain graph, because the best of
    many is partly lucky.
    replace: the winner becomes onnx/model.onnx, but for graphs made for this machine; else it is
    written beside, as onnx/model_optimized.onnx. dims: see `make_inputs`.
    Raises: ExportError for a missing or corrupt folder.
    """
    folder = Path(folder)
    source = folder / MODEL
    cases = reference_cases(folder, dims=dims, seed=seed)
    timing: dict[str, Any] = {
        "make_inputs": rows_of(cases), "threads": threads, "batch": batch,
        "min_seconds": min_seconds, "min_runs": min_runs, "seed": seed, "control": True,
    }  # fmt: skip
    rules = _Rules(cases, atol, rtol, min_gain, timing)
    with tempfile.TemporaryDirectory(prefix="slimfuse-optimize-") as made:
        trials: dict[str, Trial] = {}
        files: dict[str, Path] = {}
        for index, candidate in enumerate(candidates(source, model_config(folder))):
            target = Path(made) / f"{index}.onnx"
            trials[candidate.name] = _made(candidate, source, target, rules)
            if trials[candidate.name].outcome == "lost":  # until it's timed
                files[candidate.name] = target
        result = bench({PLAIN: source, **files}, progress=_half(progress, 0), **timing)
        for name in files:
            trials[name] = _judged(trials[name], result, min_gain)
        winner = _confirmed(trials, files, source, rules, replace, progress)
        written = _write(folder, source, files[winner], trials[winner], replace) if winner else None
        return Optimized(tuple(trials.values()), winner, written, result.environment)


def _made(candidate: Candidate, source: Path, target: Path, rules: _Rules) -> Trial:
    """Return the trial of a candidate that may be timed as "lost", any other as it ended."""
    name, portable = candidate.name, candidate.portable
    try:
        candidate.make(source, target)
        foreign = _foreign(load_model(target))
        if not foreign:  # only onnxruntime's own checks know of the others
            check_graph(target)
        if check_dims(target) != check_dims(source):
            raise ExportError("inputs or outputs are not what they were")
        worst, _ = check_cases(target, rules.cases, atol=rules.atol, rtol=rules.rtol)
    except NotTried as reason:
        return Trial(name, "skipped", reason.what, portable)
    except ExportError as error:
        got = f": {error.got}" if error.got is not None else ""
        return Trial(name, "failed", f"{error.what}{got}", portable)
    if foreign:
        portable = False
    return Trial(name, "lost", "not timed", portable, (), worst, model_bytes(target))


def _foreign(model: onnx.ModelProto) -> set[str]:
    return {node.domain for node in model.graph.node} - {*STANDARD, CONTRIB}


def _judged(trial: Trial, result: BenchResult, min_gain: float) -> Trial:
    ratios = tuple(result.ratios(PLAIN, other=trial.name))
    reason = _why_not(ratios, min_gain)
    outcome: Outcome = "lost" if reason else "won"
    gain = max(r.value for r in ratios)
    return Trial(
        trial.name, outcome, reason or f"at least {1 - gain:.1%} faster", trial.portable, ratios,
        trial.max_abs, trial.bytes,
    )  # fmt: skip


def _why_not(ratios: Sequence[Ratio], min_gain: float) -> str:
    """Return why ratios are no win, empty where they are one."""
    worst = max(ratios, key=lambda r: r.value)
    if noise := next((r.noise for r in ratios if r.noisy), ""):
        return f"no verdict: {noise}"
    if worst.verdict == "slower":
        return f"slower: {worst.value:.3f} × the plain graph's time"
    if any(r.verdict != "faster" for r in ratios):
        return f"no difference that is sure: 95 % {worst.low:.3f}–{worst.high:.3f}"
    if worst.value > 1 - min_gain:
        return f"gains {1 - worst.value:.1%}, less than the {min_gain:.0%} asked for"
    return ""


def _confirmed(
    trials: dict[str, Trial],
    files: Mapping[str, Path],
    source: Path,
    rules: _Rules,
    replace: bool,
    progress: Progress | None,
) -> str | None:
    """Return the fastest candidate that wins a second time; the trials say so where one doesn't."""
    won = [t for t in trials.values() if t.outcome == "won" and (t.portable or not replace)]
    for trial in sorted(won, key=lambda t: max(r.value for r in t.ratios)):
        pair = {PLAIN: source, trial.name: files[trial.name]}
        again = _judged(trial, bench(pair, progress=_half(progress, 1), **rules.timing), 0)
        if again.outcome == "won":
            return trial.name
        lost = f"won once, not again: {again.reason}"
        trials[trial.name] = Trial(
            trial.name, "lost", lost, trial.portable, again.ratios, trial.max_abs, trial.bytes
        )
    return None


def _write(folder: Path, source: Path, made: Path, trial: Trial, replace: bool) -> Path:
    target = folder / (MODEL if replace and trial.portable else OPTIMIZED)
    before, model = load_model(source), load_model(made)
    step = f"optimize: {trial.name}"
    stamp(model, before=before, step=step, machine_specific=not trial.portable)
    with replacing(target) as part:
        save_model(model, part)
    return target


def _half(progress: Progress | None, index: int) -> Callable[[float, str], None] | None:
    if progress is None:
        return None
    label = ("timing all", "timing the best again")[index]
    return lambda done, words: progress((index + done) / 2, f"{label}: {words}")
