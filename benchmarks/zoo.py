"""Models that several benchmarks start from, trained once and kept under runs/zoo."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from slimfuse.data import ImageData, Split, load_fashion_mnist
from slimfuse.families import FAMILIES, Shape
from slimfuse.finetune.distill import labels_loss
from slimfuse.finetune.loop import best_precision, fit
from slimfuse.finetune.schedule import Schedule, steps_of
from slimfuse.tasks import Augmentation, ImageClassification
from slimfuse.tasks.image_classification import Pixels, make_processor

ZOO = Path("runs/zoo")
TASK = ImageClassification()
WIDE = Shape(128, 4, 256, 6)
NARROW = Shape(64, 4, 128, 6)


def vit(
    name: str,
    data: ImageData,
    split: Split,
    shape: Shape,
    *,
    seed: int,
    epochs: float,
    lr: float = 1e-3,
    batch_size: int = 64,
    patch_size: int = 4,
    classes: Sequence[str] | None = None,
    kinds: tuple[Augmentation, ...] = (),
) -> Path:
    """Return the folder of a ViT trained on a split, training it where it isn't there yet."""
    folder = ZOO / name
    if (folder / "model.safetensors").is_file():
        return folder.resolve()
    family = FAMILIES["vit"]
    labels = data.classes if classes is None else classes
    config = family.new_config(
        shape, patch_size=patch_size, image_size=data.image_size, labels=labels
    )
    torch.manual_seed(seed)
    model = family.build(config, attention="eager")
    processor = make_processor(data.image_size, data.mean, data.std)
    pixels = Pixels(split, processor)
    folder.mkdir(parents=True, exist_ok=True)
    fit(
        model,
        labels_loss(TASK, lambda i: TASK.examples(pixels, i, kinds)),
        len(pixels),
        Schedule(steps_of(len(pixels), epochs, batch_size), batch_size, lr, seed=seed),
        precision=best_precision(),
        checkpoint=folder / "checkpoint.safetensors",
        what=f"training {name}",
    )
    model.save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)
    (folder / "checkpoint.safetensors").unlink()
    return folder.resolve()


def fashion(seed: int, second: int = 0) -> Path:
    """Return a 128-wide, 6-deep ViT trained on all of Fashion-MNIST, the first or second of two."""
    data = load_fashion_mnist()
    name = f"fashion-{seed}-{'ab'[second]}"
    return vit(name, data, data.train, WIDE, seed=2 * seed + second, epochs=7)


def anchor(seed: int) -> Path:
    """Return a 64-wide, 6-deep ViT trained on all of Fashion-MNIST: what `method: ot` needs."""
    data = load_fashion_mnist()
    return vit(f"anchor-{seed}", data, data.train, NARROW, seed=100 + seed, epochs=3)


def some_classes(seed: int, first: int, count: int = 5, shape: Shape = WIDE) -> Path:
    """Return a ViT trained on the images of `count` classes from `first` on, and no others."""
    data = load_fashion_mnist()
    wanted = np.flatnonzero((data.train.labels >= first) & (data.train.labels < first + count))
    split = data.train.take(wanted)
    split = Split(split.items, split.labels - first)
    named = "" if shape == WIDE else f"-{shape.hidden_size}"
    return vit(
        f"classes-{first}-{first + count - 1}-seed-{seed}{named}", data, split, shape,
        seed=10 * seed + first, epochs=2, classes=data.classes[first : first + count],
    )  # fmt: skip


def main() -> None:
    """Train what is named: `python benchmarks/zoo.py fashion:2 anchor:0 …`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="kind:argument,argument")
    makers = {f.__name__: f for f in (fashion, anchor, some_classes)}
    torch.set_num_threads(1)
    for model in parser.parse_args().models:
        kind, arguments = model.split(":")
        print(makers[kind](*(int(a) for a in arguments.split(","))))


if __name__ == "__main__":
    main()
