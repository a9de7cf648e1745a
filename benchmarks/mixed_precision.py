"""Which products of a quantised file stay float32 (`make bench-mixed-precision`).

forecast: the KL that rounding a product is expected to cost, a number (`slimfuse diagnose`).
noise: each product's own SQNR, the quantised product beside the float one. onnxruntime's debug
rankings are of its own tools for QDQ files: the weights' and the input activations' SQNR.
random: the control, three draws.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import job_of, machine, settle, write
from deployment import calibration
from onnxruntime.quantization import qdq_loss_debug
from slimfuse_export import (
    bench,
    load_reference,
    open_session,
    product_noise,
    quantization_plan,
    write_mode,
)
from slimfuse_export.quantization import Mode

from slimfuse.batch import Batch, arrays
from slimfuse.diagnose.answers import divergences
from slimfuse.pipeline.answering import kind_of
from slimfuse.pipeline.forecasting import forecast_ranking
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.run import quiet
from slimfuse.tasks import ask

RUNS = (
    ("recipes/vit/digits.yaml", "runs/vit-digits-half"),
    ("recipes/vit/fashion-mnist.yaml", "runs/vit-fashion-mnist-half"),
    ("recipes/bert/wordnet-minilm.yaml", "runs/bert-wordnet-half"),
)
MODES: tuple[Mode, ...] = ("dynamic", "static", "int4")
SHARES = (1 / 8, 1 / 4, 1 / 2)
ONNX = Path("model/onnx/model.onnx")
DRAWS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One file: its answers' mean KL from the float file's, in nats, and its figure."""

    mode: str
    ranking: str
    kept: int
    kl: float
    figure: float


def main() -> None:
    """Measure every run's mixed files and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs=2, action="append", metavar=("RECIPE", "RUN"))
    parser.add_argument("--samples", type=int, default=2_000, help="test samples at most")
    parser.add_argument("--min-seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    runs = [(Path(a), Path(b)) for a, b in arguments.run or RUNS]
    runs = [pair for pair in runs if (pair[1] / ONNX).is_file()]
    if not runs:
        raise SystemExit("no finished run is here: give --run RECIPE RUN")
    quiet()
    tables, claims = [], {}
    for recipe, run in runs:
        with TemporaryDirectory(prefix="bench-mixed-") as folder:
            table = measure(recipe, run, Path(folder), arguments.samples, arguments.min_seconds)
        tables.append(table)
        for mode in MODES:
            for other in ("noise", "onnxruntime weights", "onnxruntime inputs", "random"):
                ahead = [
                    total(table, mode, "forecast", kept) <= total(table, mode, other, kept)
                    for kept in table["kept"]
                ]
                claims[f"{run.name}, {mode}: forecast's KL at most {other}'s, each length"] = all(
                    ahead
                )
    content = {"runs": tables, "machine": machine(), "cpu": asdict(quantization_plan())}
    write("mixed-precision", content, markdown(content))
    settle(claims)


def total(table: Mapping[str, Any], mode: str, ranking: str, kept: int) -> float:
    """Return the mean KL of a ranking's files with so many products float."""
    found = [
        r["kl"] for r in table["rows"]
        if (r["mode"], r["ranking"], r["kept"]) == (mode, ranking, kept)
    ]  # fmt: skip
    return float(np.mean(found))


def measure(recipe: Path, run: Path, folder: Path, limit: int, seconds: float) -> dict[str, Any]:
    """Return all rows of one run's child; folder: for files that live as long."""
    job = job_of(run, recipe, limit)
    onnx, plan, inputs = run / ONNX, quantization_plan(), calibration(job, run / "model")
    answers = Answers(job, run / "model")
    truth = answers.of(onnx)
    rows = [Row("float32", "–", 0, 0.0, answers.figure(truth))]
    kept_counts: list[int] = []
    timed: dict[str, Path] = {"float32": onnx}
    cases = [case.inputs for case in load_reference(onnx.with_name("samples.npz"))]
    for mode in MODES:
        plain = folder / f"{mode}.onnx"

        def made(name: str, kept: Sequence[str], mode: Mode = mode) -> Path:
            path = folder / f"{name}.onnx"
            write_mode(onnx, path, mode, plan=plan, inputs=inputs, keep_float=kept)
            return path

        def add(ranking: str, kept: Sequence[str], path: Path, mode: Mode = mode) -> None:
            found = answers.of(path)
            rows.append(
                Row(mode, ranking, len(kept), answers.apart(truth, found), answers.figure(found))
            )

        made(mode, ())
        add("plain", (), plain)
        noisy = [one.product for one in product_noise(onnx, plain, cases)]
        static = folder / "static-all.onnx"
        if not static.exists():
            write_mode(onnx, static, "static", plan=plan, inputs=inputs)
        rankings = {
            "forecast": forecast_ranking(job, run / "model", onnx, mode),
            "noise": noisy,
            **debug_rankings(onnx, static, noisy, inputs, folder),
        }
        kept_counts = sorted({max(1, round(share * len(noisy))) for share in SHARES})
        for ranking, order in rankings.items():
            assert sorted(order) == sorted(noisy), ranking
            for count in kept_counts:
                path = made(f"{mode}-{ranking.replace(' ', '-')}-{count}", order[:count])
                add(ranking, order[:count], path)
        for draw in DRAWS:
            order = list(np.random.default_rng(draw).permutation(noisy))
            for count in kept_counts:
                add("random", order[:count], made(f"{mode}-random-{draw}-{count}", order[:count]))
        middle = kept_counts[len(kept_counts) // 2]
        timed[mode] = plain
        for ranking in ("forecast", "onnxruntime-weights"):
            name = f"{mode}-{ranking}-{middle}"
            timed[name] = folder / f"{name}.onnx"
    return {
        "run": run.name, "metric": job.task.metric.key, "n": answers.n, "kept": kept_counts,
        "products": len(noisy), "rows": [asdict(row) for row in rows],
        "times": times(timed, job, seconds),
    }  # fmt: skip


class Answers:
    """A job's test answers by ONNX files, one sample at a time as INT8 scales ask."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.samples = job.task.samples(job.data.test, job.task.load(folder))
        self.n = len(self.samples)

    def of(self, path: Path) -> Any:
        """Return the evidence of a file."""
        session = open_session(path, threads=torch.get_num_threads())
        output = self.job.task.output

        def answer(inputs: Batch) -> torch.Tensor:
            return torch.from_numpy(session.run([output], arrays(inputs))[0])

        return ask(answer, self.job.task, self.samples, what=path.stem, batch_size=1)

    def figure(self, evidence: Any) -> float:
        """Return the task's metric."""
        return float(self.job.task.figures(evidence)[self.job.task.metric.key].value)

    def apart(self, before: Any, after: Any) -> float:
        """Return the mean KL of two files' answers, in nats."""
        kind = kind_of(self.job.task)
        return float(divergences(kind, before["logits"], after["logits"]).mean())


def debug_rankings(
    onnx: Path, static: Path, products: Sequence[str], inputs: Sequence[Any], folder: Path
) -> dict[str, list[str]]:
    """Return products by what onnxruntime's debug module says of a QDQ file, the worst first."""
    from slimfuse_export.graph import load_model
    from slimfuse_export.quantization.products import named
    from slimfuse_export.quantization.products import products as products_of

    plain = folder / "named.onnx"
    model = load_model(onnx)
    named(model)
    found = [one for one in products_of(model.graph) if one.name in products]
    import onnx as library

    library.save(model, plain)
    with contextlib.redirect_stdout(io.StringIO()):
        matched = qdq_loss_debug.create_weight_matching(str(plain), str(static))
        weights = qdq_loss_debug.compute_weight_error(matched)
        pairs = []
        for name, path in (("float", plain), ("qdq", static)):
            seen = folder / f"seen-{name}.onnx"
            qdq_loss_debug.modify_model_output_intermediate_tensors(str(path), str(seen))
            pairs.append(qdq_loss_debug.collect_activations(str(seen), Reader(inputs)))
        both = qdq_loss_debug.create_activation_matching(pairs[1], pairs[0])
        activations = qdq_loss_debug.compute_activation_error(both)
    by_weight = {p.name: weights[p.weight] for p in found}
    by_input = {p.name: activations[p.input]["xmodel_err"] for p in found}
    return {
        "onnxruntime weights": sorted(by_weight, key=by_weight.__getitem__),
        "onnxruntime inputs": sorted(by_input, key=by_input.__getitem__),
    }


class Reader:
    """Gives one batch after the other, in the library's way."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.left: Iterator[Any] = iter(inputs)

    def __iter__(self) -> Iterator[Any]:
        return self.left

    def get_next(self) -> Any:
        """Return the next batch, None at the end."""
        return next(self.left, None)


def times(files: Mapping[str, Path], job: Job, seconds: float) -> list[dict[str, Any]]:
    """Return each file's time over the float file's, one thread, batch 1, in turns."""
    usual = arrays(job.example)

    def one(rows: int) -> dict[str, Any]:
        return {name: value[:rows] for name, value in usual.items()}

    make: Callable[[int], Any] = one
    result = bench(dict(files), threads=[1], batch=[1], min_seconds=seconds, make_inputs=make)
    return [
        asdict(result.ratio("float32", name, threads=1, batch=1))
        for name in files if name != "float32"
    ]  # fmt: skip


def markdown(content: Mapping[str, Any]) -> str:
    """Return the tables as a page."""
    lines = ["# Mixed precision: which products stay float32", "", str(__doc__).strip(), ""]
    for run in content["runs"]:
        counts = run["kept"]
        head = " | ".join(f"{n} of {run['products']} float" for n in counts)
        lines += [f"## {run['run']}, {run['n']} test samples", ""]
        plain = {r["mode"]: r for r in run["rows"] if r["ranking"] in ("plain", "–")}
        floats = plain.pop("float32")
        lines += [f"float32: {run['metric']} {100 * floats['figure']:.2f} %", ""]
        lines += [
            f"| mode | ranking | {head} |", "| --- | --- |" + " --- |" * len(counts)
        ]  # fmt: skip
        for mode, all_small in plain.items():
            lines.append(f"| {mode} | all small | {cell([all_small])} |" + " |" * (len(counts) - 1))
            for ranking in dict.fromkeys(r["ranking"] for r in run["rows"]):
                if ranking in ("plain", "–"):
                    continue
                cells = [
                    cell([r for r in run["rows"]
                          if (r["mode"], r["ranking"], r["kept"]) == (mode, ranking, n)])
                    for n in counts
                ]  # fmt: skip
                lines.append(f"| {mode} | {ranking} | " + " | ".join(cells) + " |")
        lines += ["", "| file | time ÷ float32's (95 %) |", "| --- | --- |"]
        lines += [
            f"| {r['other']} | {r['value']:.3f} ({r['low']:.3f} – {r['high']:.3f}) |"
            for r in run["times"]
        ]
        lines.append("")
    lines += [
        "KL of the float file's answers from the file's, in 10⁻³ nats a sample, and the figure in "
        "%; of random lists the mean of three draws. One sample at a time.",
        "", "Machine: " + "; ".join(f"{k} {v}" for k, v in content["machine"].items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def cell(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean KL and figure of some rows."""
    kl = 1e3 * np.mean([r["kl"] for r in rows])
    return f"{kl:.3f}, {100 * np.mean([r['figure'] for r in rows]):.2f}"


if __name__ == "__main__":
    main()
