"""How near a narrower model's speed comes to its arithmetic (`make bench-latency`).

Random-weight models of the sizes that people ship, exported as a run exports them: their time and
bytes over the widest one's, beside the ratio of floating-point operations. Time doesn't depend on
what a model knows.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import machine, settle, write
from plots import Line, Panel, draw
from slimfuse_export import bench, quantization_plan, write_mode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from slimfuse.batch import Batch
from slimfuse.onnx import export_onnx
from slimfuse.pipeline.run import quiet

WIDTHS = (768, 576, 384, 192)
LAYERS, TOKENS = 6, 128
FILES = ("float32", "INT8")


def model_of(kind: str, width: int) -> tuple[torch.nn.Module, Batch]:
    """Return a random model and an input of two samples."""
    sizes = {"hidden_size": width, "num_hidden_layers": LAYERS, "intermediate_size": 4 * width,
             "num_attention_heads": width // 64, "attn_implementation": "eager"}  # fmt: skip
    torch.manual_seed(0)
    if kind == "BERT":
        model = BertForSequenceClassification(BertConfig(**sizes))
        ids = torch.randint(1000, 2000, (2, TOKENS))
        return model.eval(), Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=176))  # 122 tokens
    return model.eval(), Batch({"pixel_values": torch.randn(2, 3, 176, 176)})


def operations(width: int) -> int:
    """Return multiplications of a sample: products with weights, and attention's own."""
    return LAYERS * TOKENS * (12 * width**2 + 2 * TOKENS * width)


def measure(kind: str, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Return bytes and times of every width and file, timed in turns."""
    files, sizes, plan = {}, {}, quantization_plan()
    example: Batch | None = None
    for width in WIDTHS:
        model, example = model_of(kind, width)
        path, small = (folder / f"{kind}-{width}-{file}.onnx" for file in FILES)
        export_onnx(model, example, path, opset=20, output="logits")
        write_mode(path, small, "dynamic", plan=plan, inputs=())
        for file, made in zip(FILES, (path, small), strict=True):
            files[f"{width} {file}"], sizes[f"{width} {file}"] = made, made.stat().st_size
    assert example is not None
    given = {name: np.asarray(value[:1]) for name, value in example.arguments.items()}
    result = bench(files, threads=[1], batch=[1], min_seconds=seconds, make_inputs=lambda _: given)
    base = f"{WIDTHS[0]} {FILES[0]}"
    rows = []
    for width in WIDTHS:
        for file in FILES:
            name = f"{width} {file}"
            ratio = None if name == base else asdict(result.ratio(base, name, threads=1, batch=1))
            rows.append(
                {"kind": kind, "width": width, "file": file, "bytes": sizes[name],
                 "operations": operations(width) / operations(WIDTHS[0]), "ratio": ratio}
            )  # fmt: skip
    return rows


def main() -> None:
    """Measure both kinds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--min-seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    quiet()
    with TemporaryDirectory(prefix="bench-latency-") as folder:
        rows = [
            row for kind in ("BERT", "ViT")
            for row in measure(kind, Path(folder), arguments.min_seconds)
        ]  # fmt: skip
    lines = [
        "# Time and size against arithmetic", "", str(__doc__).strip(), "",
        f"{LAYERS} blocks, heads of 64, MLPs of four times the width, {TOKENS} tokens (ViT 122). "
        "onnxruntime, one thread, batch 1, p50, all files of a kind in turns; over the float32 "
        f"file of width {WIDTHS[0]}.", "",
        "| kind | width | file | operations | time (95 %) | time ÷ operations | MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in rows:
        ratio = r["ratio"] or {"value": 1.0, "low": 1.0, "high": 1.0, "noisy": False}
        span = f"{ratio['value']:.3f} ({ratio['low']:.3f} – {ratio['high']:.3f})"
        lines.append(
            f"| {r['kind']} | {r['width']} | {r['file']} | {r['operations']:.3f} | {span}"
            f"{', noisy' * ratio['noisy']} | {ratio['value'] / r['operations']:.2f} "
            f"| {r['bytes'] / 1e6:.1f} |"
        )
    lines += ["", "Machine: " + "; ".join(f"{k} {v}" for k, v in machine().items()), ""]
    write("latency", {"rows": rows, "machine": machine()}, "\n".join(lines))
    draw(
        "latency",
        [
            Panel(kind, "operations, ratio", "time, ratio",
                  [*(Line(f, *zip(*((r["operations"], (r["ratio"] or {"value": 1.0})["value"])
                     for r in rows if (r["kind"], r["file"]) == (kind, f)), strict=True))
                     for f in FILES), Line("as the operations", (0.06, 1), (0.06, 1), "k:")], "xy")
            for kind in ("BERT", "ViT")
        ],
    )  # fmt: skip
    half = {r["kind"]: r["ratio"]["value"] for r in rows
            if r["width"] == WIDTHS[0] // 2 and r["file"] == "float32"}  # fmt: skip
    settle({f"{k}: half the width takes less than half the time": v < 0.5 for k, v in half.items()})


if __name__ == "__main__":
    main()
