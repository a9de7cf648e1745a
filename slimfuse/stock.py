"""Prove that a finished folder opens in stock tools, in a process without slimfuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from slimfuse import compat
from slimfuse.errors import CheckFailed, UserError

TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4  # other kernels than those that made the logits

PREPROCESSORS = ("preprocessor_config.json", "tokenizer.json")

START = """
import json, os, sys
sys.modules["slimfuse"] = None          # importing it anywhere below is an error
sys.modules["slimfuse_export"] = None
import logging
logging.disable(logging.WARNING)
import numpy as np
folder, threads = sys.argv[1], int(sys.argv[2])
"""

STOCK = """
import torch
import transformers
torch.set_num_threads(threads)
with open(folder + "/config.json") as file:
    stock = json.load(file)["architectures"][0]
autos = {"ForImageClassification": "AutoModelForImageClassification",
         "ForSequenceClassification": "AutoModelForSequenceClassification",
         "ForMaskedLM": "AutoModelForMaskedLM", "ForCausalLM": "AutoModelForCausalLM",
         "LMHeadModel": "AutoModelForCausalLM", "Model": "AutoModel"}
auto = next(name for end, name in autos.items() if stock.endswith(end))
output = "last_hidden_state" if auto == "AutoModel" else "logits"
model, info = getattr(transformers, auto).from_pretrained(
    folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False)
texts = os.path.exists(folder + "/tokenizer.json")
prepare = "AutoTokenizer" if texts else "AutoImageProcessor"
processor = getattr(transformers, prepare).from_pretrained(folder)
problems = {k: sorted(map(str, v)) for k, v in info.items() if v}
name, parameters = type(model).__name__, sum(p.numel() for p in model.parameters())

def answer(inputs):
    with torch.no_grad():
        said = model.eval()(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    return getattr(said, output).numpy()
"""

ONNX = """
import onnxruntime as ort
from safetensors.numpy import load_file
from transformers import AutoImageProcessor
options = ort.SessionOptions()
options.intra_op_num_threads = threads
session = ort.InferenceSession(folder + "/onnx/model.onnx", options)
processor = AutoImageProcessor.from_pretrained(folder)
with open(folder + "/config.json") as file:
    name = "the ONNX file of " + json.load(file)["architecture"]
weights = load_file(folder + "/model.safetensors")
# a BatchNorm's statistics are no parameters
parameters = sum(v.size for k, v in weights.items()
                 if not k.endswith(("running_mean", "running_var", "num_batches_tracked")))
problems, output = {}, "logits"

def answer(inputs):
    return session.run([output], inputs)[0]
"""

COMPARE = """
with np.load(folder + "/onnx/samples.npz", allow_pickle=False) as file:
    saved = dict(file)
gap, scale, samples = 0.0, 0.0, 0
for case in sorted({key.split("/")[0] for key in saved if "/inputs/" in key}):
    start = case + "/inputs/"
    inputs = {k.removeprefix(start): v for k, v in saved.items() if k.startswith(start)}
    got, want = answer(inputs), saved[case + "/outputs/" + output]
    if got.shape != want.shape:
        problems["shape of the " + output] = [str(got.shape), str(want.shape)]
        continue
    samples += len(want)
    gap = float(np.maximum(gap, np.abs(got - want).max()))  # keeps a NaN, unlike max()
    scale = max(scale, float(np.abs(want).max()))
print("RESULT " + json.dumps({"class": name, "processor": type(processor).__name__,
      "problems": problems, "gap": gap, "scale": scale, "samples": samples,
      "parameters": parameters}))
"""

MENDING = Path(compat.__file__).read_text(encoding="utf-8")
TIMM = """
import os
import timm
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor
torch.set_num_threads(threads)
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with open(folder + "/config.json") as file:
    name = json.load(file)["architecture"]
saved, own = load_file(folder + "/model.safetensors"), model.state_dict()
problems = {k: sorted(v) for k, v in {"missing": own.keys() - saved.keys(),
                                      "unexpected": saved.keys() - own.keys()}.items() if v}
processor = AutoImageProcessor.from_pretrained(folder)
output = "logits" if model.num_classes else "last_hidden_state"
parameters = sum(p.numel() for p in model.parameters())

def answer(inputs):
    pixels = torch.from_numpy(inputs["pixel_values"])
    with torch.no_grad():
        return (model(pixels) if model.num_classes else model.forward_features(pixels)).numpy()
"""

SCRIPT = MENDING + START + STOCK + COMPARE
ONNX_SCRIPT = MENDING + START + ONNX + COMPARE
TIMM_SCRIPT = MENDING + START + TIMM + COMPARE
SCRIPTS = {"stock": SCRIPT, "timm": TIMM_SCRIPT, "plain": ONNX_SCRIPT}


@dataclass(frozen=True)
class Verified:
    """What the clean process saw; `gap` is the largest difference of answers, relative."""

    model_class: str
    processor_class: str
    parameters: int
    gap: float


def verify(folder: Path, *, threads: int = 1) -> Verified:
    """Open `folder` with transformers' Auto classes, or timm, where slimfuse can't be imported.

    A plain net has no stock class: there onnxruntime opens its ONNX file. Raises UserError when
    the folder is not a finished one, CheckFailed when a weight is missing or unexpected or the
    answers differ from the run's by more than 1e-5 (ONNX: 1e-4) of their size.
    """
    needed = ("config.json", "model.safetensors", "onnx/samples.npz")
    missing = [name for name in needed if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in PREPROCESSORS):
        missing.append(" or ".join(PREPROCESSORS))
    if missing:
        raise UserError(
            "this is not a finished model folder",
            where=str(folder),
            got=f"no {', no '.join(missing)}",
            hint="give the `model` folder of a run that has finished",
        )
    kind = _kind(folder)
    plain, script = kind == "plain", SCRIPTS[kind]
    tolerance = ONNX_TOLERANCE if plain else TOLERANCE
    done = subprocess.run(
        # -P: nothing in the current folder may stand in for an installed package
        [sys.executable, "-P", "-c", script, str(folder.resolve()), str(threads)],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        what = "onnxruntime" if plain else "stock classes"
        raise CheckFailed(f"{what} can't open the folder", where=str(folder), got=last)
    result = json.loads(lines[0].removeprefix("RESULT "))
    gap = result["gap"] / (result["scale"] or 1.0)
    if result["problems"]:
        raise CheckFailed(
            "weights don't fit the stock class",
            where=str(folder),
            got="; ".join(f"{what}: {', '.join(n[:5])}" for what, n in result["problems"].items()),
        )
    if not result["samples"]:
        raise CheckFailed(
            "the folder holds no answers of its run to compare with",
            where=str(folder / "onnx/samples.npz"),
        )
    if not gap <= tolerance:
        raise CheckFailed(
            f"{'onnxruntime' if plain else 'the stock class'} gives other answers than the run did",
            where=str(folder),
            got=f"{gap:.2e} relative",
            allowed=f"{tolerance:.0e}",
        )
    return Verified(result["class"], result["processor"], result["parameters"], gap)


def _kind(folder: Path) -> str:
    """Tell whose class a folder's config names: transformers' (stock), timm's or none (plain)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return "stock"
    if not isinstance(config, dict) or "architecture" not in config or "model_type" in config:
        return "stock"
    return "timm" if "pretrained_cfg" in config else "plain"
