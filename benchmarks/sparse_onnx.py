"""Sparsified at its own shape and exported: parity, bytes, time (`make bench-sparse-onnx`)."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from common import accuracy, machine, row, write

from slimfuse import sparsify
from slimfuse.pipeline.comparison import interval

RECIPE = Path("recipes/vit/fashion-mnist.yaml")
OUT = Path("runs/bench-sparse-onnx")
SPARSITY, STEPS, EPOCHS = 0.8, 4, 0.4
ROWS = ("a", "sparse", "sparse-magnitude", "onnx", "onnx-int8")


def main() -> None:
    """Prune a trained ViT a seed by the command's own way, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=Path, default=Path("runs/zoo"), help="folder of fashion-K-a")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    arguments = parser.parse_args()
    runs = [
        sparsify(
            RECIPE, sparsity=SPARSITY, steps=STEPS, out=OUT / str(seed),
            overrides=(
                f"parents=[{{name: a, from: {(arguments.zoo / f'fashion-{seed}-a').resolve()}}}]",
                "finetune.distill.teachers=[a]", f"sparsify.epochs={EPOCHS}", "gates=[]",
                f"finetune.seed={seed}", f"runtime.seed={seed}",
                f"runtime.threads={arguments.threads}",
            ),
        )
        for seed in arguments.seeds
    ]  # fmt: skip
    figures = {name: [accuracy(run, name) for run in runs] for name in ROWS}
    parity = [row(run, "onnx").parity_max_abs or 0.0 for run in runs]
    sizes = {
        f"{s.file}, {s.model}": [(x.bytes, x.compressed) for x in (r.report.sizes[i] for r in runs)]
        for i, s in enumerate(runs[0].report.sizes)
    }
    ratios = {
        f"batch {s.batch}, {s.threads} thread{'s' * (s.threads > 1)}": [
            x.ratio for r in runs for x in r.report.speedups
            if (x.other, x.base, x.batch, x.threads) == ("onnx", "finetuned", s.batch, s.threads)
        ]
        for s in runs[0].report.speedups
    }  # fmt: skip
    shares = [sum(z.zeros for z in r.report.zeros) / sum(z.weights for z in r.report.zeros)
              for r in runs]  # fmt: skip
    content = {
        "accuracy": figures, "parity": parity, "sizes": sizes, "ratios": ratios, "zeros": shares,
        "conditions": machine() | {"threads": str(arguments.threads)},
    }  # fmt: skip
    lines = [
        "# 80 % zeros, then ONNX: parity, bytes, time",
        "",
        f"`slimfuse sparsify`: a ViT (6 × 128, Fashion-MNIST) at its own shape, "
        f"{mean(shares):.1%} of the weights of linear layers and convolutions zero by WoodFisher "
        f"(512 gradients, {STEPS} steps), {EPOCHS:g} epochs of recovery with the dense model as "
        f"teacher; 10,000 test images (one accuracy's own 95 % interval about ±0.6 points); "
        f"{of_seeds(len(runs))}. Control: magnitude, layer by layer, the same otherwise.",
        "",
        "| model | accuracy % |",
        "| --- | --- |",
        *(f"| {names(name)} | {spread(found, 1)} |" for name, found in figures.items()),
        "",
        f"Largest difference of torch's and onnxruntime's logits: {max(parity):.1e}.",
        "",
        "| file | kB on disk | kB by zlib (level 6, as gzip) |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {mean(b for b, _ in found) / 1e3:.0f} "
            f"| {mean(c for _, c in found) / 1e3:.0f} |"
            for name, found in sizes.items()
        ),
        "",
        "| dense over sparse, p50 of the float32 files | ratio |",
        "| --- | --- |",
        *(f"| {name} | {spread(found, 2)} |" for name, found in ratios.items()),
        "",
        "onnxruntime gives no speed for unstructured zeros: it computes them like any other "
        "number. What is gained is bytes once the file is compressed.",
        "",
        "Machine: " + "; ".join(f"{k} {v}" for k, v in content["conditions"].items()),
    ]
    write("sparse-onnx", content, "\n".join(lines) + "\n")


def of_seeds(count: int) -> str:
    """Return what the figures are over."""
    if count == 1:
        return "one model"
    return f"{count} models of {count} seeds, mean ± half the 95 % interval"


def names(name: str) -> str:
    """Return what a row of the report is."""
    told = {"a": "dense", "onnx": "sparse, ONNX float32", "onnx-int8": "sparse, ONNX INT8"}
    return told.get(name, name)


def spread(values: list[float], digits: int) -> str:
    """Return mean ± half the 95 % interval over the seeds, where there are several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    middle, low, high = interval(values, 0)
    return f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


if __name__ == "__main__":
    main()
