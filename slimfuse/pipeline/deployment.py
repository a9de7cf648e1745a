"""The stages after training: ONNX files, their INT8 copies, their accuracy and latency."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from slimfuse_export import CheckFailed as ExportCheckFailed
from slimfuse_export import (
    bench,
    check_parity,
    environment,
    fallbacks,
    load_reference,
    open_session,
    optimize_folder,
    product_noise,
    quantization_plan,
    resize_batch,
    save_reference,
    write_mode,
)
from slimfuse_export.quantization import Mode
from torch import Tensor

from slimfuse.batch import Batch, arrays, call
from slimfuse.errors import CheckFailed
from slimfuse.onnx import export_onnx
from slimfuse.pipeline.forecasting import forecast_ranking
from slimfuse.pipeline.job import Job
from slimfuse.pipeline.stages import ANSWERS, BaseStages
from slimfuse.progress import track, working
from slimfuse.recipe import AnyRecipe
from slimfuse.report import Tried
from slimfuse.store import Stage, Store
from slimfuse.tasks import Evidence, Task, ask

PARITY_BATCHES = (1, 3, 5)  # the graph is traced with 2
PARITY_RTOL = 1e-4
CHILDREN = ("onnx", "onnx-int8")
DENSE = "finetuned"  # timed where the children are sparse
BENCH, TRIALS, RANKING = "bench.json", "trials.json", "ranking.json"
CALIBRATION = 64  # training samples that static ranges come from
File = tuple[Path, str]
"""An ONNX file, and what its content is known by."""
MIN_RUNS, MAX_RUNS = 30, 1000  # timed calls of each file
SINGLE_FLOPS = 1e12  # about a minute at batch 1 on one core


def batch_of(row: str, flops: float, task: Task) -> int:
    """Return the batch size at which an ONNX file is judged in `flops` of work.

    INT8 takes its activations' scales from the batch, so it is measured one sample at a time, as
    it will be used, where that is quick. Every other file gives the same at any batch.
    """
    return 1 if row == "onnx-int8" and flops <= SINGLE_FLOPS else task.batch_size


class Deployment:
    """What `Stages` made, as files for onnxruntime; each method returns a finished stage."""

    def __init__(self, stages: BaseStages) -> None:
        self.stages, self.job, self.store = stages, stages.job, stages.store
        self.recipe, self.base = stages.recipe, stages.base

    def export(self, name: str, model_folder: Path, key: str) -> tuple[Stage, float]:
        """Return the ONNX file of a model and its largest difference from torch's logits."""
        opset, atol = self.recipe.export.opset, self.recipe.export.parity_atol

        def build(folder: Path) -> None:
            model = self.job.family.load(model_folder, attention="eager")
            samples, task = self.stages.samples("test"), self.job.task
            count = len(samples)
            example = task.examples(samples, torch.arange(2) % count)[0]
            with working(f"exporting {name} to ONNX"):
                export_onnx(
                    self.job.family.stock_form(model), example, folder / "model.onnx",
                    opset=opset, output=task.output,
                )  # fmt: skip
            cases, gaps = [], []
            for batch in PARITY_BATCHES:
                inputs = task.excerpt(task.examples(samples, torch.arange(batch) % count)[0])
                with torch.no_grad():
                    want = getattr(call(model, inputs), task.output).numpy()
                given = arrays(inputs)
                try:
                    gaps.append(
                        check_parity(
                            folder / "model.onnx", given, want,
                            atol=atol, rtol=PARITY_RTOL, threads=self.job.threads,
                            output=task.output,
                        ).max_abs
                    )  # fmt: skip
                except ExportCheckFailed as error:
                    raise CheckFailed(
                        f"the ONNX file of {name} gives other answers than torch (batch {batch})",
                        where=str(error.where), got=error.got, allowed=error.allowed,
                    ) from error  # fmt: skip
                cases.append((given, {task.output: want}))
            save_reference(folder / "samples.npz", cases)
            (folder / "parity.json").write_text(json.dumps({"max_abs": max(gaps)}))

        inputs = self.base | {"model": key, "opset": opset, "atol": atol, "tools": _tools()}
        stage = self.store.stage(f"onnx-{name}", inputs, build)
        return stage, float(json.loads((stage.path / "parity.json").read_text())["max_abs"])

    @property
    def mode(self) -> tuple[Mode, str]:
        """How the recipe's quantised file is made, and why."""
        asked = self.recipe.export.quantize.mode
        mode: Mode = asked if asked in ("static", "int4") else "dynamic"
        said = "" if asked == "auto" else f"mode {mode} was asked for; "
        return mode, f"{said}{quantization_plan().reason}"

    def quantised(
        self, exported: Stage, name: str = "int8", *, keep_float: Sequence[str] = ()
    ) -> Stage:
        """Return the quantised file of an ONNX stage; keep_float: products that stay float32."""
        plan, (mode, _) = quantization_plan(), self.mode

        def build(folder: Path) -> None:
            with working("quantising"):
                write_mode(
                    exported.path / "model.onnx", folder / "model_quantized.onnx", mode,
                    plan=plan, inputs=self._calibration() if mode == "static" else (),
                    keep_float=keep_float,
                )  # fmt: skip

        inputs = {"onnx": exported.key, "reduce_range": plan.reduce_range, "tools": _tools()}
        if mode != "dynamic":
            inputs |= {"mode": mode, "signed": plan.signed, "rows": CALIBRATION} | self.base
        if keep_float:
            inputs |= {"keep_float": list(keep_float)}
        return self.store.stage(name, inputs, build)

    def mixed(
        self, exported: Stage, quantised: Stage, child: Path
    ) -> Iterator[tuple[tuple[str, ...], Stage]]:
        """Yield ever longer lists of products, with the file in which those stay float32.

        The dearest by the forecast of a child's layers go first, then those with most noise.
        """

        def build(folder: Path) -> None:
            onnx = exported.path / "model.onnx"
            with working("finding what must stay in float32"):
                cases = [case.inputs for case in load_reference(exported.path / "samples.npz")]
                noise = product_noise(onnx, quantised.path / "model_quantized.onnx", cases)
                ranked = [one.product for one in noise]
                if isinstance(self.job, Job):
                    ranked = [*forecast_ranking(self.job, child, onnx, self.mode[0]), *ranked]
            (folder / RANKING).write_text(json.dumps(list(dict.fromkeys(ranked))))

        stage = self.store.stage("float-ranking", self.base | {"int8": quantised.key}, build)
        for kept in fallbacks(json.loads((stage.path / RANKING).read_text())):
            yield kept, self.quantised(exported, "int8-mixed", keep_float=kept)

    def _calibration(self) -> list[dict[str, Any]]:
        """Return training samples, evenly drawn, from which static ranges come."""
        samples, task = self.stages.samples("train"), self.job.task
        count = min(CALIBRATION, len(samples))
        places = torch.arange(count) * len(samples) // count
        return [arrays(task.excerpt(task.examples(samples, part)[0])) for part in places.split(8)]

    def optimised(self, exported: Stage) -> tuple[Stage, tuple[Tried, ...]]:
        """Return the fastest graph of an ONNX stage on this machine, and all that were tried."""
        spec = self.recipe.bench

        def build(folder: Path) -> None:
            onnx = folder / "onnx"
            onnx.mkdir()
            for file in ("model.onnx", "samples.npz"):
                shutil.copyfile(exported.path / file, onnx / file)
            model_type = str(getattr(self.job.target, "model_type", ""))
            shape = {
                key: getattr(self.job.target, key)
                for key in ("num_attention_heads", "hidden_size", "n_head", "n_embd", "n_heads")
                if hasattr(self.job.target, key)
            }
            (folder / "config.json").write_text(json.dumps({"model_type": model_type, **shape}))
            with track("trying other graphs", 100) as tell:
                done = optimize_folder(
                    folder, replace=True, threads=spec.threads, batch=spec.batch,
                    min_seconds=spec.min_seconds, seed=self.recipe.runtime.seed,
                    atol=self.recipe.export.parity_atol, rtol=PARITY_RTOL,
                    progress=lambda share, label: tell(round(100 * share), label),
                )  # fmt: skip
            for file in ("model.onnx", "samples.npz"):
                (onnx / file).replace(folder / file)
            (folder / TRIALS).write_text(json.dumps(done.as_dict()))

        given = {
            "onnx": exported.key, "bench": spec.model_dump(mode="json"), "tools": _tools(),
            "machine": environment(),
        }  # fmt: skip
        stage = self.store.stage("onnx-optimised", given, build)
        trials = json.loads((stage.path / TRIALS).read_text())["trials"]
        return stage, tuple(
            Tried(
                "onnx/model.onnx", t["name"], "kept" if t["outcome"] == "won" else t["outcome"],
                ", ".join(f"{r['value']:.3f} × its time" for r in t["ratios"]), t["reason"],
            )
            for t in trials
        )  # fmt: skip

    def evidence(self, stage: Stage, file: str, saved: Path, *, batch: int) -> Evidence:
        """Return what an ONNX file says of the test set, through the *saved* preprocessor."""

        def build(folder: Path) -> None:
            session = open_session(stage.path / file, threads=self.job.threads)
            task = self.job.task

            def answer(inputs: Batch) -> Tensor:
                return torch.from_numpy(session.run([task.output], arrays(inputs))[0])

            # a text is cut where the task says; the saved tokenizer's own limit may be longer
            samples = task.samples(self.job.data.test, task.load(saved))
            found = ask(answer, task, samples, what=f"measuring {stage.name}", batch_size=batch)
            save_file(found, folder / ANSWERS)

        made = self.store.stage(
            f"scores-{stage.name}",
            self.base | {"model": stage.key, "file": file, "batch": batch, "tools": _tools()},
            build,
        )
        return load_file(made.path / ANSWERS)

    def usual(self, rows: int) -> dict[str, Any]:
        """Return inputs of a usual size."""
        return dict(resize_batch(arrays(self.job.example), rows))

    def bench(self, files: Mapping[str, File]) -> dict[str, Any]:
        """Return interleaved latencies of a run's ONNX files by row, see `Timing.result`."""
        bases = {*(p.name for p in self.job.parents), DENSE}
        pairs = [(base, row) for base in files for row in files if base in bases]
        pairs = [(base, row) for base, row in pairs if row in CHILDREN]
        return Timing(self.store, self.recipe, self.usual).result(files, pairs)


@dataclass(frozen=True)
class Timing:
    """How files are timed: by a recipe's settings, on inputs that `inputs` makes of some rows."""

    store: Store
    recipe: AnyRecipe
    inputs: Callable[[int], dict[str, Any]]

    def result(self, files: Mapping[str, File], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Return latencies of ONNX files by name, the ratios of pairs (base, other), the machine.

        All are timed in turns, call by call; kept as a stage.
        """
        spec = self.recipe.bench

        def build(folder: Path) -> None:
            with track("measuring latency", 100) as tell:
                result = bench(
                    {name: path for name, (path, _) in files.items()},
                    threads=spec.threads,
                    batch=spec.batch,
                    warmup=spec.warmup,
                    min_seconds=spec.min_seconds,
                    min_runs=MIN_RUNS,
                    max_runs=MAX_RUNS,
                    seed=self.recipe.runtime.seed,
                    make_inputs=self.inputs,
                    progress=lambda share, label: tell(round(100 * share), label),
                )
            conditions = [(t, b) for t in spec.threads for b in spec.batch]
            ratios = [
                asdict(result.ratio(base, other, threads=t, batch=b))
                for base, other in pairs
                for t, b in conditions
            ]
            kept = {
                "latencies": [asdict(entry) for entry in result.latencies],
                "ratios": ratios,
                "environment": {k: str(v) for k, v in result.environment.items()},
            }
            (folder / BENCH).write_text(json.dumps(kept, indent=1))

        given = {
            "models": {name: key for name, (_, key) in files.items()},
            "pairs": [list(pair) for pair in pairs],
            "bench": spec.model_dump(mode="json"),
            "machine": environment(),  # what was timed elsewhere is no figure of this machine
        }
        made = self.store.stage("bench", given, build)
        found: dict[str, Any] = json.loads((made.path / BENCH).read_text())
        return found


def _tools() -> dict[str, str]:
    return {name: version(name) for name in ("onnx", "onnxruntime", "onnxscript")}
