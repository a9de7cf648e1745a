"""The deployable folder: the layout that transformers and transformers.js expect."""

from __future__ import annotations

import shutil
from pathlib import Path

from jinja2 import Environment

from slimfuse.errors import CheckFailed
from slimfuse.pipeline.common import BaseJob
from slimfuse.pipeline.nets_job import NetJob
from slimfuse.progress import working
from slimfuse.stock import verify
from slimfuse.store import Stage
from slimfuse.tasks import Measured

CARD = """\
---
library_name: {{ library }}
pipeline_tag: {{ task.name }}
tags: [slimfuse, model-fusion, onnx]
metrics: [accuracy]
---
# {{ name }}

One {{ model }}, fused by slimfuse {{ version }} from

{% for p in parents %}- **{{ p.name }}**: {{ p.shape }}, accuracy {{ p.accuracy }}
{% endfor %}

on `{{ data }}`, {{ training }}.

| file | accuracy ({{ n }} test {{ task.sample }}s, 95 % interval) |
| --- | --- |
{% for row in files %}| `{{ row.file }}` | {{ row.accuracy }}{{ row.note }} |
{% endfor %}
{% if decided %}

That the INT8 file comes along (it loses no more than {{ decided }}) was decided on the test set.
{% endif %}

```python
{{ opening }}
```

Latency depends on the machine: measure it there with `slimfuse-export bench path/to/this/folder`.
The folder is checked with `slimfuse verify` and `slimfuse-export check`.
"""
STOCK = """\
from transformers import {preprocessor}, {model}
model = {model}.from_pretrained("path/to/this/folder")
preprocessor = {preprocessor}.from_pretrained("path/to/this/folder")"""
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
) -> None:
    """Put the finished model's files into `folder` and prove that it opens elsewhere.

    Raises CheckFailed when the exporter's own check or the clean process disagrees.
    """
    onnx = folder / "onnx"
    onnx.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", *job.task.files):
        shutil.copyfile(finetuned.path / name, folder / name)
    for name in ("model.onnx", "samples.npz"):
        shutil.copyfile(exported.path / name, onnx / name)
    if int8 is not None:
        shutil.copyfile(int8.path / "model_quantized.onnx", onnx / "model_quantized.onnx")
    (folder / "README.md").write_text(card, encoding="utf-8")
    with working("checking the finished model in a process of its own"):
        _prove(folder, job)


def _prove(folder: Path, job: BaseJob) -> None:
    from slimfuse_export import check_folder

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
) -> str:
    """Return README.md; it holds nothing that differs from run to run.

    files: accuracy of each file, and the batch size it was measured at where that matters.
    """
    family, plain = job.family, isinstance(job, NetJob)
    stock = plain or type(family.build(job.target)).__name__
    opening = STOCK.format(preprocessor=job.task.auto_preprocessor, model=job.task.auto_model)
    taught = ", ".join(t.name for t in job.teachers)
    several = len(job.teachers) > 1
    quantize = job.recipe.export.quantize
    template = Environment(autoescape=False, trim_blocks=True).from_string(CARD)  # noqa: S701 - Markdown
    return template.render(
        name=job.recipe.name,
        library="onnx" if plain else "transformers",
        task=job.task,
        opening=PLAIN if plain else opening,
        model=family.shape(job.target) if plain else f"{stock} of {family.shape(job.target)}",
        version=version,
        parents=[
            {"name": p.name, "shape": family.shape(p.config), "accuracy": percent(parents[p.name])}
            for p in job.parents
        ],
        data=job.data.name,
        training=f"then finetuned for {steps} steps with {taught} as teacher{'s' * several}"
        if steps
        else "not finetuned",
        n=len(job.data.test),
        files=[
            {"file": file, "accuracy": percent(m), "note": f", at batch {batch}" if batch else ""}
            for file, (m, batch) in files.items()
        ],
        decided=f"{quantize.max_drop:.2%}"
        if quantize.mode == "auto" and "onnx/model_quantized.onnx" in files
        else "",
    )


def percent(measured: Measured) -> str:
    """Return an accuracy with its interval."""
    return f"{measured.value:.2%} ({measured.low:.2%} – {measured.high:.2%})"
