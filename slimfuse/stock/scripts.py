"""What the clean process does with a folder: programs that know nothing of slimfuse.

Each is run with `folder`, `threads` and `tell`, which takes what it found.
"""

COMMON = """
import json, os
import numpy as np
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

TIMM = """
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
    mask = inputs.get("attention_mask")
    if mask is not None and got.shape[:2] == mask.shape:
        # nobody reads the padding, and its rounding is larger: 4e-5 in twelve blocks
        got, want = got[mask == 1], want[mask == 1]
    gap = float(np.maximum(gap, np.abs(got - want).max()))  # keeps a NaN, unlike max()
    scale = max(scale, float(np.abs(want).max()))
tell({"class": name, "processor": type(processor).__name__, "problems": problems, "gap": gap,
      "scale": scale, "samples": samples, "parameters": parameters})
"""

SCRIPTS = {
    kind: COMMON + opening + COMPARE
    for kind, opening in {"stock": STOCK, "timm": TIMM, "plain": ONNX}.items()
}
