"""transformers.js in node opens our folders and gives what we give, in float32 and in INT8.

SLIMFUSE_NODE_MODULES names a folder made by `npm install --ignore-scripts
@huggingface/transformers`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
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

MODULES = os.environ.get("SLIMFUSE_NODE_MODULES")
SCRIPT = Path(__file__).with_name("open_folder.mjs")
COUNT = 20
SAVED: dict[str, Callable[[Path], Path]] = {
    "image-classification": lambda f: save_vit(f, AutoModelForImageClassification),
    "text-classification": lambda f: save_bert(f, AutoModelForSequenceClassification, num_labels=5),
    "sentence-embedding": lambda f: save_bert(f, AutoModel, "last_hidden_state"),
    "causal-lm": save_gpt2,
}
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not MODULES or not shutil.which("node"),
                       reason="SLIMFUSE_NODE_MODULES names no folder, or there is no node"),
]  # fmt: skip


def theirs(folder: Path, dtype: str, task: str, inputs: list[Any]) -> list[NDArray[np.float64]]:
    assert MODULES
    done = subprocess.run(
        ["node", str(SCRIPT), MODULES, str(folder), dtype],
        input=json.dumps({"task": task, "inputs": inputs}), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
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


@pytest.mark.parametrize("task", SAVED)
def test_node_gives_the_same_answers(task: str, tmp_path: Path) -> None:
    folder = SAVED[task](tmp_path / "model")
    items, sent = inputs_of(task)
    for dtype in ("fp32", "q8"):
        model = open_deployed(folder, int8=dtype == "q8")
        found = theirs(folder, dtype, task, sent)
        assert len(found) == COUNT
        for item, one in zip(items, found, strict=True):
            value: Any
            if isinstance(model.preparation, TextPreparation):
                value = model.preparation.collate([model.preparation(item)])
            else:
                value = {"pixel_values": model.preparation(item)[None]}
            (wanted,) = run_session(model.session, value).values()
            if dtype == "fp32":
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
