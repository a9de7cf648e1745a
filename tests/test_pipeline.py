"""A whole run: what the folder holds, and what a second run repeats."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import events, folder_bytes, recipe, undrawn, unproved, write_recipe

from slimfuse.errors import SlimfuseError
from slimfuse.pipeline import Run, compress, plan
from slimfuse.report import from_json
from slimfuse.store import Stage, Store
from slimfuse.tasks import Evidence

MODEL_FILES = {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "README.md",
    "onnx/model.onnx",
    "onnx/model_quantized.onnx",
    "onnx/samples.npz",
}
STAGES = {
    "a": "parent",
    "b": "parent",
    "fused": "fused",
    "finetuned": "finetuned",
    "onnx": "onnx",
    "onnx-int8": "onnx-int8",
    "random-refit": "baseline",
    "random-start": "baseline",
}

# the parents' files are no part of the model, and the proof is a process of its own
MEASURED_RUN = """
import resource, sys
import pytest
from tiny_run import parents_unexported, unproved
from slimfuse.pipeline import compress
with pytest.MonkeyPatch.context() as patch:
    parents_unexported(patch)
    unproved(patch)
    compress(sys.argv[1], out="run")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished run's folder that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    return tmp_path / "run"


def test_the_folder_holds_what_the_contract_says(finished: Run) -> None:
    root = finished.folder
    top = {path.name for path in root.iterdir()} - {".lock"}
    assert top == {
        "recipe.lock.yaml", "model", "report.html", "report.json", "stages", "log.jsonl",
    }  # fmt: skip
    assert set(folder_bytes(finished.model)) == MODEL_FILES
    assert all((s / "manifest.json").is_file() for s in (root / "stages").iterdir())
    assert [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]


def test_report_has_a_measured_row_for_every_model(finished: Run) -> None:
    report = from_json((finished.folder / "report.json").read_text())
    rows = {row.name: row for row in report.rows}
    assert {name: row.stage for name, row in rows.items()} == STAGES
    for name, row in rows.items():
        accuracy = row.metrics["accuracy"]
        assert accuracy.n == 60 and accuracy.low <= accuracy.value <= accuracy.high
        timed = STAGES[name] in ("parent", "onnx", "onnx-int8")
        assert len(row.latency) == timed
        assert all(0 < x.p50_ms <= x.p90_ms <= x.p99_ms for x in row.latency)
    notes = {name: row.metrics["accuracy"].note for name, row in rows.items()}
    assert notes["onnx"] == "test set, at batch 256" and notes["a"] == "test set"
    assert notes["onnx-int8"] == "test set, at batch 1"
    calibrated = [p.title for p in report.pictures if "calibration samples" in p.caption]
    assert len(calibrated) == 4
    sizes = {"a": "stages/parent-a-*/model.safetensors", "onnx": "model/onnx/model.onnx"}
    for name, pattern in sizes.items():
        assert rows[name].bytes == next(finished.folder.glob(pattern)).stat().st_size
    assert rows["onnx"].parity_max_abs is not None and rows["onnx"].parity_max_abs < 1e-4
    assert {(s.base, s.other) for s in report.speedups} == {
        (base, other) for base in "ab" for other in ("onnx", "onnx-int8")
    }


def test_report_counts_the_time_of_every_stage(finished: Run) -> None:
    made = set(events(finished.folder, "done"))
    assert finished.report.timings.keys() == made - {"run"}
    assert {"parent-a", "fused", "bench"} <= made


def test_nothing_of_this_machine_is_in_the_model_or_the_lock(
    finished: Run, tiny_recipe: Path
) -> None:
    paths = [str(p).encode() for p in (finished.folder, tiny_recipe.parent, Path.cwd())]
    secrets = [*paths, b"/site-packages", f"/{getpass.getuser()}/".encode()]
    for file in (*finished.model.rglob("*"), finished.folder / "recipe.lock.yaml"):
        if file.is_file():
            content = file.read_bytes()
            assert not [s for s in secrets if s in content], file.name
    assert str(finished.folder).encode() in (finished.folder / "report.json").read_bytes(), (
        "the command as typed is in the report: this search does find paths"
    )


def test_another_process_makes_the_same_bytes_within_the_planned_memory(
    finished: Run, tiny_recipe: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURED_RUN, str(tiny_recipe)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert folder_bytes(tmp_path / "run" / "model") == folder_bytes(finished.model)
    peak, estimate = int(done.stdout) << 10, plan(tiny_recipe).memory
    assert peak <= estimate <= 3 * peak, f"{peak >> 20} MiB measured, {estimate >> 20} estimated"


def test_a_second_run_repeats_nothing(
    copied: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    before = folder_bytes(copied / "stages")
    again = compress(tiny_recipe, out=copied)
    assert events(copied, "start") == []
    assert set(events(copied, "cached")) >= {"fused", "finetuned", "package", "bench"}
    assert folder_bytes(copied / "stages") == before
    assert again.passed


@pytest.mark.parametrize(
    ("override", "repeated"),
    [
        ("bench.min_seconds=0.03", {"bench", "package"}),  # whose files name their recipe
        (
            "finetune.lr=1e-3",
            {
                "finetuned", "scores-finetuned", "finetuned-random-start",
                "scores-finetuned-random-start", "onnx-child", "scores-onnx-child", "int8",
                "scores-int8", "package", "bench",
            },
        ),
    ],
)  # fmt: skip
def test_a_changed_key_repeats_only_what_depends_on_it(
    copied: Path,
    tiny_recipe: Path,
    override: str,
    repeated: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unproved(monkeypatch)
    undrawn(monkeypatch)
    compress(tiny_recipe, overrides=(override,), out=copied)
    assert set(events(copied, "start")) == repeated


def test_results_of_another_recipe_are_withdrawn_before_any_work(
    copied: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimfuse.pipeline.stages import Stages

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stages, "start", stop)
    old = (copied / "recipe.lock.yaml").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_recipe, overrides=("fuse.ridge=0.01",), out=copied)
    assert (copied / "recipe.lock.yaml").read_bytes() != old
    assert not [n for n in ("model", "report.json", "report.html") if (copied / n).exists()]


def test_nothing_is_published_where_the_report_can_not_be_written(
    copied: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimfuse.pipeline import run

    make = run.make_report
    monkeypatch.setattr(
        run, "make_report", lambda found: replace(make(found), timings={"package": float("nan")})
    )
    for name in ("model", "report.json", "report.html"):
        Store(copied).withdraw(name)
    with pytest.raises(SlimfuseError, match="not finite"):
        compress(tiny_recipe, out=copied)
    assert not [n for n in ("model", "report.json", "report.html") if (copied / n).exists()]
    monkeypatch.undo()
    undrawn(monkeypatch)
    assert compress(tiny_recipe, out=copied).model.is_dir()


def test_an_altered_model_folder_is_made_whole(
    finished: Run, copied: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    (copied / "model" / "config.json").write_text("{}")
    (copied / "model" / "extra.txt").write_text("not ours")
    compress(tiny_recipe, out=copied)
    assert folder_bytes(copied / "model") == folder_bytes(finished.model)


def test_a_gate_that_fails_is_reported(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn(monkeypatch)
    strict = recipe(gates=[{"metric": "params", "max_ratio": 0.01}])
    run = compress(write_recipe(tmp_path / "strict.yaml", strict), out=copied)
    assert not run.passed
    (gate,) = from_json((copied / "report.json").read_text()).gates
    assert gate.metric == "params" and not gate.passed


@pytest.mark.parametrize("right", [30, 35])
def test_int8_is_shipped_where_it_keeps_the_accuracy(
    copied: Path, tiny_recipe: Path, right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimfuse.pipeline.deployment import Deployment

    original = Deployment.evidence

    def said(self: Deployment, stage: Stage, file: str, saved: Path, *, batch: int) -> Evidence:
        """Let the INT8 file be right on the first `right` images, the float file on 33."""
        made = original(self, stage, file, saved, batch=batch)
        labels = torch.from_numpy(self.job.data.test.labels)
        hits = torch.arange(len(labels)) < (right if "quantized" in file else 33)
        found = torch.nn.functional.one_hot((labels + ~hits) % 10, 10).float()
        return made | {"logits": found}

    monkeypatch.setattr(Deployment, "evidence", said)
    unproved(monkeypatch)
    undrawn(monkeypatch)
    run = compress(tiny_recipe, overrides=("export.quantize.mode=auto",), out=copied)
    shipped = (run.model / "onnx" / "model_quantized.onnx").exists()
    row = next(row for row in run.report.rows if row.name == "onnx-int8")
    assert shipped == (right > 33) == row.note.startswith("shipped")
    assert "decided on the test set" in row.note
    card = (run.model / "README.md").read_text()
    assert shipped == ("quantized" in card) == ("was decided on the test set" in card)
    assert any("INT8 loses 5.00%" in w for w in run.report.warnings) != shipped


def test_card_reads_as_markdown(finished: Run) -> None:
    card = (finished.model / "README.md").read_text()
    for line in ("- **a**", "on `digits`", "| file |", "```python"):
        assert f"\n\n{line}" in card  # else it runs into what stands before
    assert card.count("| `") == 3 and "{" not in card


def test_planned_counts_are_those_of_the_files(finished: Run, tiny_recipe: Path) -> None:
    from safetensors import safe_open

    planned = {model.name: model for model in plan(tiny_recipe).models}
    for name, pattern in {"a": "stages/parent-a-*", "child": "model"}.items():
        file = next(finished.folder.glob(pattern)) / "model.safetensors"
        with safe_open(file, "pt") as weights:
            stored = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
        assert planned[name].params == stored
        assert planned[name].bytes == 4 * stored
    assert planned["child"].steps == 10  # 2 epochs of ⌈150 / 32⌉ batches
    written = sum(f.stat().st_size for f in finished.folder.rglob("*") if f.is_file())
    assert written <= plan(tiny_recipe).disk
