"""Opens folders with transformers or optimum-onnx and prints one line of JSON for each input.

python open_folder.py TOOL FILE < questions.json, a list of `folder`, `task` and `inputs`; nothing
of slimfuse is imported. FILE: the graph, which transformers don't need.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

CLASSES = {
    "image-classification": "ImageClassification",
    "text-classification": "SequenceClassification",
    "sentence-embedding": "FeatureExtraction",
    "causal-lm": "CausalLM",
}


def main(tool: str, file: str) -> None:
    """Answer what standard input asks."""
    sys.modules["slimfuse"] = sys.modules["slimfuse_export"] = None  # type: ignore[assignment]
    for asked in json.load(sys.stdin):
        answer(tool, file, asked["folder"], asked["task"], asked["inputs"])


def answer(tool: str, file: str, folder: str, task: str, inputs: list[Any]) -> None:
    """Print what a folder's model says to every input."""
    import numpy as np
    import torch

    model: Any
    if tool == "transformers":
        own = CLASSES[task].replace("FeatureExtraction", "")
        library = importlib.import_module("transformers")
        model = getattr(library, f"AutoModelFor{own}" if own else "AutoModel")
        model = model.from_pretrained(folder).eval()
    else:
        library = importlib.import_module("optimum.onnxruntime")
        more = {"use_cache": False, "use_io_binding": False} if task == "causal-lm" else {}
        model = getattr(library, f"ORTModelFor{CLASSES[task]}")
        model = model.from_pretrained(folder, subfolder="onnx", file_name=file, **more)
    transformers = importlib.import_module("transformers")
    if task == "image-classification":
        prepare = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    else:
        prepare = transformers.AutoTokenizer.from_pretrained(folder)
    for one in inputs:
        if task == "image-classification":
            shape = (one["height"], one["width"], 3)
            given = prepare(np.array(one["data"], np.uint8).reshape(shape), return_tensors="pt")
        else:
            given = prepare(one, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**given)
        values = found.get("logits", found.get("last_hidden_state"))
        print(json.dumps({"dims": list(values.shape), "values": values.flatten().tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
