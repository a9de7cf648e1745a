"""The deployable folder: the layout that transformers and transformers.js expect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from jinja2 import Environment
from slimfuse_export import Provenance, check_folder, stamp_file

from slimfuse.errors import CheckFailed
from slimfuse.families.timm_model import TimmConfig
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.nets_job import NetJob
from slimfuse.progress import working
from slimfuse.stock import verify
from slimfuse.store import Stage
from slimfuse.tasks import Measured

CARD = """\
---
library_name: {{ library }}
pipeline_tag: {{ task.tag or task.name }}
tags: [slimfuse, model-fusion, onnx]
metrics: [{{ metrics }}]
{% if licence %}license: {{ licence }}
{% endif %}---
# {{ name }}

One {{ model }}, fused by slimfuse {{ version }} from

{% for p in parents %}- **{{ p.name }}**: {{ p.shape }}, {{ metric }} {{ p.figure }}
{% endfor %}

on `{{ data }}`, {{ training }}.
{% if sparse %}

{{ sparse }}
{% endif %}

| file | {{ metric }} ({{ n }} test {{ task.sample }}s, 95 % interval) |
| --- | --- |
{% for row in files %}| `{{ row.file }}` | {{ row.figure }}{{ row.note }} |
{% endfor %}
{% if decided %}

That the INT8 file comes along (it loses no more than {{ decided }}) was decided on the test set.
{% endif %}

```python
{{ opening }}
```
{% if licences %}

Licences of what it is made of: {{ licences }}. {{ terms }} This is no legal advice.
{% endif %}

Latency depends on the machine: measure it there with `slimfuse-export bench path/to/this/folder`.
The folder is checked with `slimfuse verify` and `slimfuse-export check`.
"""
OPTIONAL = (
    "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""What a class or its preprocessor may save beside."""
STOCK = """\
from transformers import {preprocessor}, {model}
model = {model}.from_pretrained("path/to/this/folder")
preprocessor = {preprocessor}.from_pretrained("path/to/this/folder")"""
TIMM = """\
import timm
model = timm.create_model("local-dir:path/to/this/folder", pretrained=True)

# or in transformers
"""
PLAIN = """\
from onnxruntime import InferenceSession
from transformers import AutoImageProcessor
session = InferenceSession("path/to/this/folder/onnx/model.onnx")
processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
(logits,) = session.run(["logits"], dict(processor(images=[image], return_tensors="np")))

from slimfuse.nets import load  # or as a torch module
model = load("path/to/this/folder")"""


def build_package(
    folder: Path,
    job: BaseJob,
    finetuned: Stage,
    exported: Stage,
    int8: Stage | None,
    card: str,
    made_of: Provenance,
) -> None:
    """Put the finished model's files into `folder` and prove that it opens elsewhere.

    made_of: goes into the metadata of the ONNX files.

    Raises CheckFailed when the exporter's own check or the clean process disagrees.
    """
    onnx = folder / "onnx"
    onnx.mkdir(exist_ok=True)
    kept = [name for name in OPTIONAL if (finetuned.path / name).is_file()]
    for name in ("config.json", "model.safetensors", *job.task.files, *kept):
        shutil.copyfile(finetuned.path / name, folder / name)
    for name, content in job.task.extras(job.processor, job.target).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("model.onnx", "samples.npz"):
        shutil.copyfile(exported.path / name, onnx / name)
    if int8 is not None:
        shutil.copyfile(int8.path / "model_quantized.onnx", onnx / "model_quantized.onnx")
    for file in sorted(onnx.glob("*.onnx")):
        stamp_file(file, provenance=made_of)
    (folder / "README.md").write_text(card, encoding="utf-8")
    with working("checking the finished model in a process of its own"):
        _prove(folder, job)


def _prove(folder: Path, job: BaseJob) -> None:
    failed = [r for r in check_folder(folder, atol=job.recipe.export.parity_atol) if not r.passed]
    if failed:
        raise CheckFailed(
            "the finished folder fails its check",
            got="; ".join(f"{r.name}: {r.detail}" for r in failed),
        )
    verify(folder, threads=job.threads)


def model_card(
    job: BaseJob,
    steps: int,
    parents: dict[str, Measured],
    files: dict[str, tuple[Measured, int | None]],
    version: str,
    sparse: str = "",
    chosen: int = 0,
) -> str:
    """Return README.md; it holds nothing that differs from run to run.

    parents, files: the task's first figure; of a file with the batch size it was measured at,
    where that matters; sparse: a sentence about zeros; chosen: the step whose weights were the best
    on held-out samples, 0 where none were held out.
    """
    metric, told = job.task.metric, job.licences
    found = told.found
    family, plain = job.family, isinstance(job, NetJob)
    timm = isinstance(job.target, TimmConfig)
    built = family.stock_form(family.build(job.target))
    stock = f"timm {job.target.architecture}" if timm else type(built).__name__
    opening = STOCK.format(preprocessor=job.task.auto_preprocessor, model=job.task.auto_model)
    opening += f"\n{job.task.usage}" * bool(job.task.usage)
    taught = ", ".join(t.name for t in job.teachers)
    several = len(job.teachers) > 1
    quantize = job.recipe.export.quantize
    template = Environment(autoescape=False, trim_blocks=True).from_string(CARD)  # noqa: S701 - Markdown
    return template.render(
        name=job.recipe.name,
        library="onnx" if plain else "timm" if timm else "transformers",
        task=job.task,
        opening=PLAIN if plain else f"{TIMM}{opening}" if timm else opening,
        model=family.shape(job.target) if plain else f"{stock} of {family.shape(job.target)}",
        version=version,
        parents=[
            {
                "name": p.name,
                "shape": family.shape(p.config),
                "figure": metric.limits(parents[p.name]),
            }
            for p in job.parents
        ],
        data=job.data.name,
        training=f"then finetuned for {steps} steps with {taught} as teacher{'s' * several}"
        + f" (these are the weights of step {chosen}, the best on held-out training samples)"
        * bool(chosen)
        if steps
        else "not finetuned",
        sparse=sparse,
        n=job.count("test"),
        metric=metric.key.replace("_", " "),
        metrics=", ".join(m.key for m in job.task.metrics),
        files=[
            {
                "file": file,
                "figure": metric.limits(m),
                "note": f", at batch {batch}" if batch else "",
            }
            for file, (m, batch) in files.items()
        ],
        licence=next(iter(names))
        if len(names := {x.name for x in found.values()}) == 1 and next(iter(found.values())).known
        else "",
        licences=", ".join(f"{name}: {one.name}" for name, one in found.items()),
        terms=" ".join(f"{text[0].upper()}{text[1:]}." for text in told.sentences),
        decided=metric.amount(quantize.max_drop)
        if quantize.mode != "dynamic" and "onnx/model_quantized.onnx" in files
        else "",
    )
