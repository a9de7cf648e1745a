"""The files that are deployed: their quality, size and speed (`make bench-deployment`)."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import job_of, machine, settle, write
from slimfuse_export import (
    fallbacks,
    load_reference,
    open_session,
    product_noise,
    quantization_plan,
    write_mode,
)
from slimfuse_export.measuring.agreement import compare_benches

from slimfuse.batch import Batch, arrays, call
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.run import quiet
from slimfuse.tasks import Measured, Samples, ask

RUNS = (
    ("recipes/vit/fashion-mnist.yaml", "runs/vit-fashion-mnist-half"),
    ("recipes/vit/digits.yaml", "runs/vit-digits-half"),
    ("recipes/bert/wordnet-minilm.yaml", "runs/bert-wordnet-half"),
)
CALIBRATION = 64
ONNX = Path("model/onnx/model.onnx")


@dataclass(frozen=True)
class File:
    """A file of one child: its figure with its interval, its bytes, products that stay float."""

    kind: str
    figure: Measured
    bytes: int
    kept_float: int = 0


def main() -> None:
    """Measure every run's files, time them twice, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", nargs=2, action="append", metavar=("RECIPE", "RUN"),
        help="a finished run of `slimfuse compress` and the recipe it came from",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=10_000, help="test samples at most")
    parser.add_argument("--min-seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    runs = [(Path(a), Path(b)) for a, b in arguments.run or RUNS]
    runs = [pair for pair in runs if pair[0].is_file() and (pair[1] / ONNX).is_file()]
    if not runs:
        raise SystemExit("no finished run is here: give --run RECIPE RUN")
    quiet()
    tables, claims = [], {}
    for recipe, run in runs:
        with TemporaryDirectory(prefix="bench-deployment-") as folder:
            found = measure(recipe, run, Path(folder), arguments.samples, arguments.min_seconds)
        tables.append(found)
        torch_figure, onnx_figure = (file["figure"]["value"] for file in found["files"][:2])
        claims[f"{run.name}: the ONNX file's figure is torch's"] = torch_figure == onnx_figure
        claims[f"{run.name}: child : parent comes again within 10 %"] = all(
            one["agrees"] for one in found["ratios"]
        )
    content = {"runs": tables, "conditions": machine(), "cpu": asdict(quantization_plan())}
    write("deployment", content, markdown(content))
    settle(claims)


def measure(recipe: Path, run: Path, folder: Path, limit: int, seconds: float) -> dict[str, Any]:
    """Return all figures of one run; folder: for files that live as long as the measurement."""
    job = job_of(run, recipe, limit)
    model, files = run / "model", {"float32": run / ONNX}
    samples = job.task.samples(job.data.test, job.task.load(model))
    found = [File("torch", torch_figure(job, model, samples), weight_bytes(model))]
    found.append(File("float32", onnx_figure(job, run / ONNX, samples), size(run / ONNX)))
    plan, inputs = quantization_plan(), calibration(job, model)
    for mode in ("dynamic", "static", "int4"):
        files[mode] = folder / f"{mode}.onnx"
        made = write_mode(run / ONNX, files[mode], mode, plan=plan, inputs=inputs)
        found.append(File(mode, onnx_figure(job, files[mode], samples), made.bytes))
    cases = [case.inputs for case in load_reference(run / ONNX.with_name("samples.npz"))]
    noisy = [one.product for one in product_noise(run / ONNX, files["dynamic"], cases)]
    kept = list(fallbacks(noisy))[-1]
    files["mixed"] = folder / "mixed.onnx"
    made = write_mode(
        run / ONNX, files["mixed"], "dynamic", plan=plan, inputs=inputs, keep_float=kept
    )
    figure = onnx_figure(job, files["mixed"], samples)
    found.append(File("mixed", figure, made.bytes, len(kept)))
    files = {"parent": parent_onnx(run), **files}
    ids = cases[0].get("input_ids")
    sizes = {} if ids is None else {"sequence_length": ids.shape[1]}
    return {
        "run": run.name, "metric": job.task.metric.key, "n": len(samples),
        "files": [asdict(file) for file in found],
        "ratios": timed_twice(files, folder, seconds, sizes),
    }  # fmt: skip


def timed_twice(
    files: dict[str, Path], folder: Path, seconds: float, dims: dict[str, int]
) -> list[dict[str, Any]]:
    """Return every file's time over the parent's, as two processes of their own measured it."""
    named = folder / "named"
    named.mkdir()
    for name, path in files.items():
        shutil.copyfile(path, named / f"{name}.onnx")  # a link would be named by its target
    reports = [folder / "first.json", folder / "second.json"]
    for report in reports:
        words = [sys.executable, "-m", "slimfuse_export", "bench"]
        words += [str(named / f"{name}.onnx") for name in files]
        words += ["--min-seconds", str(seconds), "--json", "--no-memory"]
        words += [word for name, n in dims.items() for word in ("--dim", f"{name}={n}")]
        told = subprocess.run(words, check=True, stdout=subprocess.PIPE)
        report.write_bytes(told.stdout)
    compared = compare_benches(*reports)
    assert {one.other for one in compared} == {*files} - {"parent"}
    rows = [asdict(one) | {"agrees": one.agrees} for one in compared]
    first = {row["other"]: row for row in json.loads(reports[0].read_text())["ratios"]}
    return [row | {"verdict": first[row["other"]]["verdict"]} for row in rows]


def parent_onnx(run: Path) -> Path:
    """Return the ONNX file of the run's best parent, by the report's first metric."""
    report = json.loads((run / "report.json").read_text())
    parents = [row for row in report["rows"] if row["stage"] == "parent"]
    best = max(parents, key=lambda row: next(iter(row["metrics"].values()))["value"])
    return next(iter(sorted((run / "stages").glob(f"onnx-{best['name']}-*/model.onnx"))))


def torch_figure(job: Job, folder: Path, samples: Samples) -> Measured:
    """Return what the saved weights give in torch, through the saved preprocessor."""
    model = job.family.load(folder, attention="eager").eval()

    def answer(inputs: Batch) -> torch.Tensor:
        with torch.no_grad():
            return getattr(call(model, inputs), job.task.output)

    return figure(job, answer, samples, "torch")


def onnx_figure(job: Job, path: Path, samples: Samples) -> Measured:
    """Return what an ONNX file gives on the same samples."""
    session = open_session(path, threads=torch.get_num_threads())

    def answer(inputs: Batch) -> torch.Tensor:
        return torch.from_numpy(session.run([job.task.output], arrays(inputs))[0])

    return figure(job, answer, samples, path.stem)


def figure(job: Job, answer: Any, samples: Samples, what: str) -> Measured:
    """Return the task's metric of an answerer."""
    evidence = ask(answer, job.task, samples, what=what)
    return job.task.figures(evidence)[job.task.metric.key]


def calibration(job: Job, model: Path) -> list[dict[str, Any]]:
    """Return training samples for static ranges."""
    samples = job.task.samples(job.data.train, job.task.load(model))
    places = torch.arange(min(CALIBRATION, len(samples)))
    return [
        arrays(job.task.excerpt(job.task.examples(samples, part)[0])) for part in places.split(8)
    ]


def size(path: Path) -> int:
    """Return the bytes of a file."""
    return path.stat().st_size


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return size(folder / "model.safetensors")


def markdown(content: dict[str, Any]) -> str:
    """Return the table as a page."""
    lines = ["# The files that are deployed: quality, size, speed", ""]
    for run in content["runs"]:
        ratios = {row["other"]: row for row in run["ratios"]}
        lines += [
            f"## {run['run']}: {run['metric']} of {run['n']} test samples", "",
            "| file | figure (95 % interval) | kB | time ÷ parent's, first and second run | |",
            "| --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for file in run["files"]:
            f, row = file["figure"], ratios.get(file["kind"])
            timed = f"{row['first']:.3f}, {row['second']:.3f}" if row else ""
            said = ("within 10 %" if row["agrees"] else "not within 10 %") if row else ""
            kept = f" ({file['kept_float']} products float)" if file["kept_float"] else ""
            noisy = "; no verdict, the machine was noisy" if row and row["noisy"] else ""
            lines.append(
                f"| {file['kind']}{kept} | {f['value']:.4f} ({f['low']:.4f} – {f['high']:.4f}) "
                f"| {file['bytes'] / 1e3:.0f} | {timed} | {said}{noisy} |"
            )
        lines.append("")
    lines += [
        f"float32: the ONNX export. dynamic, static: INT8 products; static ranges from "
        f"{CALIBRATION} training samples. int4: 4-bit weights. mixed: dynamic, the noisier half of "
        "the products float32. Times: p50, one thread, batch 1, two processes one after the other, "
        "files in turns.",
        "",
        f"CPU: {content['cpu']['reason']}. Machine: "
        + "; ".join(f"{k} {v}" for k, v in content["conditions"].items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
