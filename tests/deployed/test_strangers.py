"""Strangers open our folders and give what we give, in float32 and in INT8.

transformers: in a process where slimfuse can't be imported, from its weights. optimum-onnx: in an
environment of its own, since it needs transformers below 4.58; SLIMFUSE_OPTIMUM_PYTHON names its
interpreter (`pip install "optimum-onnx[onnxruntime]"`). transformers.js: in node;
SLIMFUSE_NODE_MODULES names a folder made by `npm install --ignore-scripts
@huggingface/transformers`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from slimfuse_export.deployed import open_deployed
from slimfuse_export.deployed.texts import TextPreparation
from slimfuse_export.sessions import run_session
from tiny_deployed import save_bert, save_gpt2, save_vit
from tiny_text import FILLING, POSITIONS, WORDS
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from slimfuse import compat

MODULES = os.environ.get("SLIMFUSE_NODE_MODULES")
OPTIMUM = os.environ.get("SLIMFUSE_OPTIMUM_PYTHON")
HERE = Path(__file__).parent
COUNT = 20
SAVED: dict[str, Callable[[Path], Path]] = {
    "image-classification": lambda f: save_vit(f, AutoModelForImageClassification),
    "text-classification": lambda f: save_bert(f, AutoModelForSequenceClassification, num_labels=5),
    "sentence-embedding": lambda f: save_bert(f, AutoModel, "last_hidden_state"),
    "causal-lm": save_gpt2,
}
FILES = {"fp32": "model.onnx", "q8": "model_quantized.onnx"}
NODE = pytest.mark.skipif(
    not MODULES or not shutil.which("node"),
    reason="SLIMFUSE_NODE_MODULES names no folder, or there is no node",
)
PYTHON = pytest.mark.skipif(not OPTIMUM, reason="SLIMFUSE_OPTIMUM_PYTHON names no interpreter")
STRANGERS = [
    pytest.param("transformers", "fp32", id="transformers"),
    *(pytest.param("optimum", kind, id=f"optimum-{kind}", marks=PYTHON) for kind in FILES),
    *(pytest.param("node", kind, id=f"node-{kind}", marks=NODE) for kind in FILES),
]
pytestmark = pytest.mark.interop


def command(who: str, folder: Path, kind: str) -> list[str]:
    """Return what opens a folder with the program of somebody else."""
    if who == "node":
        return ["node", str(HERE / "open_folder.mjs"), str(MODULES), str(folder), kind]
    script, file = HERE / "open_folder.py", FILES[kind]
    if who == "optimum":
        return [str(OPTIMUM), "-P", str(script), who, str(folder), file]
    # torchvision, where it is installed, needs two operators declared before transformers
    mended = f"{Path(compat.__file__).read_text(encoding='utf-8')}\n"
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    return [sys.executable, "-P", "-c", mended + run, who, str(folder), file]


def theirs(
    who: str, folder: Path, kind: str, task: str, inputs: list[Any]
) -> list[NDArray[np.float64]]:
    done = subprocess.run(
        command(who, folder, kind), input=json.dumps({"task": task, "inputs": inputs}),
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [np.array(one["values"]).reshape(one["dims"]) for one in told]


def inputs_of(task: str) -> tuple[list[Any], list[Any]]:
    """Return inputs for us and, the same, for them."""
    if task == "image-classification":
        rng = np.random.default_rng(0)
        arrays = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(COUNT)]
        sent = [{"data": a.ravel().tolist(), "width": 8, "height": 8} for a in arrays]
        return [Image.fromarray(a) for a in arrays], sent
    drawn, words = random.Random(0), [*FILLING, *(w for group in WORDS.values() for w in group)]
    # none is cut: transformers.js cuts the closing token off as well
    most = POSITIONS - 2
    texts = [" ".join(drawn.choices(words, k=drawn.randint(1, most))) for _ in range(COUNT)]
    return texts, texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished folder of every task."""
    root = tmp_path_factory.mktemp("folders")
    return {task: save(root / task) for task, save in SAVED.items()}


@pytest.mark.parametrize(("who", "kind"), STRANGERS)
@pytest.mark.parametrize("task", SAVED)
def test_strangers_give_the_same_answers(
    task: str, who: str, kind: str, folders: dict[str, Path]
) -> None:
    folder = folders[task]
    items, sent = inputs_of(task)
    model = open_deployed(folder, int8=kind == "q8")
    found = theirs(who, folder, kind, task, sent)
    assert len(found) == COUNT
    for item, one in zip(items, found, strict=True):
        value: Any
        if isinstance(model.preparation, TextPreparation):
            value = model.preparation.collate([model.preparation(item)])
        else:
            value = {"pixel_values": model.preparation(item)[None]}
        (wanted,) = run_session(model.session, value).values()
        if kind == "fp32":
            # pixels are scaled in another order
            np.testing.assert_allclose(one, wanted, atol=1e-4)
        else:
            # another release of onnxruntime with other INT8 kernels, in which a value that
            # lies between two of 256 steps may go either way, in two narrow blocks
            assert rms(one - wanted) <= 0.05 * rms(wanted)
        ranked = np.sort(wanted, -1)
        sure = ranked[..., -1] - ranked[..., -2] > 2 * np.abs(one - wanted).max()
        assert sure.mean() > 0.5
        np.testing.assert_array_equal(one.argmax(-1)[sure], wanted.argmax(-1)[sure])


def rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
