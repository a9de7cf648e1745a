"""Strangers open our folders and give what we give, in float32 and in INT8.

transformers: in a process where slimfuse can't be imported, from its weights. optimum-onnx: in an
environment of its own, since it needs transformers below 4.58; SLIMFUSE_OPTIMUM_PYTHON names its
interpreter (`pip install "optimum-onnx[onnxruntime]"`). transformers.js: in node;
SLIMFUSE_NODE_MODULES names a folder made by `npm install --ignore-scripts
@huggingface/transformers`.
"""

from __future__ import annotations

import functools
import itertools
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
from tiny_text import FILLING, POSITIONS, WORDS

from slimfuse import compat

MODULES = os.environ.get("SLIMFUSE_NODE_MODULES")
OPTIMUM = os.environ.get("SLIMFUSE_OPTIMUM_PYTHON")
HERE = Path(__file__).parent
COUNT = 20
Answers = dict[str, list[NDArray[np.float64]]]
TASKS = ("image-classification", "text-classification", "sentence-embedding", "causal-lm")
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


def command(who: str, kind: str) -> list[str]:
    """Return what opens folders with the program of somebody else."""
    if who == "node":
        return ["node", str(HERE / "open_folder.mjs"), str(MODULES), kind]
    script, file = HERE / "open_folder.py", FILES[kind]
    if who == "optimum":
        return [str(OPTIMUM), "-P", str(script), who, file]
    # torchvision, where it is installed, needs two operators declared before transformers
    mended = f"{Path(compat.__file__).read_text(encoding='utf-8')}\n"
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    return [sys.executable, "-P", "-c", mended + run, who, file]


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
def theirs(folder_of: Callable[[str], Path]) -> Callable[[str, str], Answers]:
    """A function that returns what somebody else's program answers of every task.

    One process of it opens all folders: to start one takes seconds.
    """

    @functools.cache
    def ask(who: str, kind: str) -> Answers:
        asked = [{"folder": str(folder_of(task)), "task": task, "inputs": inputs_of(task)[1]}
                 for task in TASKS]  # fmt: skip
        done = subprocess.run(
            command(who, kind), input=json.dumps(asked), capture_output=True, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(told) == COUNT * len(TASKS)
        found = iter(np.array(one["values"]).reshape(one["dims"]) for one in told)
        return {task: list(itertools.islice(found, COUNT)) for task in TASKS}

    return ask


@pytest.mark.parametrize(("who", "kind"), STRANGERS)
@pytest.mark.parametrize("task", TASKS)
def test_strangers_give_the_same_answers(
    task: str,
    who: str,
    kind: str,
    folder_of: Callable[[str], Path],
    theirs: Callable[[str, str], Answers],
) -> None:
    items, _ = inputs_of(task)
    model = open_deployed(folder_of(task), int8=kind == "q8")
    found = theirs(who, kind)[task]
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
            # lies between two of 256 steps may go either way, in a narrow block
            assert rms(one - wanted) <= 0.05 * rms(wanted)
        ranked = np.sort(wanted, -1)
        sure = ranked[..., -1] - ranked[..., -2] > 2 * np.abs(one - wanted).max()
        assert sure.mean() > 0.5
        np.testing.assert_array_equal(one.argmax(-1)[sure], wanted.argmax(-1)[sure])


def rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
