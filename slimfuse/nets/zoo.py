"""Small plain nets of any widths, kept as config.json and model.safetensors."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimfuse.errors import ParentError, ShapeError, first_line


@dataclass(frozen=True)
class MLPConfig:
    """A multilayer perceptron on flattened inputs with ReLU between its layers.

    labels, here and below: the names of the classes in their order, where they are known.
    """

    inputs: int = 784
    hidden: tuple[int, ...] = (400, 200, 100)
    classes: int = 10
    labels: tuple[str, ...] = ()
    architecture: Literal["mlp"] = field(default="mlp", init=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """The sizes that may shrink, in execution order: those of the atlas' free spaces."""
        return self.hidden

    def resized(self, widths: tuple[int, ...]) -> MLPConfig:
        """Return this config with other `widths`."""
        return replace(self, hidden=widths)


@dataclass(frozen=True)
class VGGConfig:
    """3 × 3 convolutions and 2 × 2 poolings ("M"), flattened into a classifier.

    The default is VGG11 (Simonyan & Zisserman, arXiv 1409.1556) without its last two poolings,
    which leaves 3 × 3 positions of a 28 × 28 image.
    """

    channels: int = 3
    image_size: int = 28
    features: tuple[int | Literal["M"], ...] = (
        64, "M", 128, "M", 256, 256, "M", 512, 512, 512, 512,
    )  # fmt: skip
    hidden: tuple[int, ...] = ()
    classes: int = 10
    batch_norm: bool = False
    labels: tuple[str, ...] = ()
    architecture: Literal["vgg"] = field(default="vgg", init=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """The sizes that may shrink, in execution order: those of the atlas' free spaces."""
        return (*(f for f in self.features if f != "M"), *self.hidden)

    def resized(self, widths: tuple[int, ...]) -> VGGConfig:
        """Return this config with other `widths`."""
        left = iter(widths)
        features: list[int | Literal["M"]] = []
        for feature in self.features:
            features.append("M" if feature == "M" else next(left))
        return replace(self, features=tuple(features), hidden=tuple(left))


@dataclass(frozen=True)
class ResNetConfig:
    """Basic residual blocks (He et al., arXiv 1512.03385) with a 3 × 3 stem for small images.

    stages: channels of each stage's stream; blocks: blocks of each stage; inner: channels
    between the two convolutions of every block (default: those of its stage).
    """

    channels: int = 3
    stages: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    inner: tuple[int, ...] = ()
    classes: int = 10
    labels: tuple[str, ...] = ()
    architecture: Literal["resnet"] = field(default="resnet", init=False)

    def __post_init__(self) -> None:
        if not self.inner:
            inner = (w for w, n in zip(self.stages, self.blocks, strict=True) for _ in range(n))
            object.__setattr__(self, "inner", tuple(inner))

    @property
    def widths(self) -> tuple[int, ...]:
        """The sizes that may shrink, in execution order: those of the atlas' free spaces."""
        inner, widths = iter(self.inner), [self.stages[0]]
        for stage, blocks in enumerate(self.blocks):
            own = [next(inner) for _ in range(blocks)]
            # the stem opens the first stage; later ones open with their first block's inner units
            widths += own if stage == 0 else [own[0], self.stages[stage], *own[1:]]
        return tuple(widths)

    def resized(self, widths: tuple[int, ...]) -> ResNetConfig:
        """Return this config with other `widths`."""
        left = iter(widths)
        stages, inner = [next(left)], [next(left) for _ in range(self.blocks[0])]
        for blocks in self.blocks[1:]:
            inner.append(next(left))
            stages.append(next(left))
            inner += [next(left) for _ in range(blocks - 1)]
        return replace(self, stages=tuple(stages), inner=tuple(inner))


Config = MLPConfig | VGGConfig | ResNetConfig
CONFIGS: dict[str, type[Config]] = {
    "mlp": MLPConfig, "vgg": VGGConfig, "resnet": ResNetConfig,
}  # fmt: skip


def build(config: Config) -> nn.Module:
    """Return a randomly initialised net in evaluation mode; images are (batch, channels, h, w)."""
    if isinstance(config, MLPConfig):
        model: nn.Module = _perceptron("layers", config.inputs, config.hidden, config.classes)
    elif isinstance(config, VGGConfig):
        model = _vgg(config)
    else:
        model = ResNet(config)
    return model.eval()


def narrow(config: Config, widths: float | Sequence[int]) -> Config:
    """Return `config` with the given widths, or with all of its own times a ratio.

    widths: as `config.widths` lists them, so that the sizes of a pruned net's free spaces
    describe it. Raises ShapeError unless there is one for each and all are positive.
    """
    if isinstance(widths, float | int):
        sizes = tuple(max(1, round(w * widths)) for w in config.widths)
    else:
        sizes = tuple(widths)
    if len(sizes) != len(config.widths) or min(sizes, default=1) < 1:
        raise ShapeError(
            "these widths don't fit the net",
            got=list(sizes),
            allowed=f"{len(config.widths)} positive widths, now {list(config.widths)}",
        )
    return config.resized(sizes)


def save(model: nn.Module, config: Config, folder: str | Path) -> None:
    """Write config.json and model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_config(folder: str | Path) -> Config:
    """Return the config of a saved net; raises ParentError."""
    file = Path(folder) / "config.json"
    try:
        values = json.loads(file.read_text())
        make: Callable[..., Config] = CONFIGS[values.pop("architecture")]
        return make(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParentError(
            "this is no saved net",
            where=str(file),
            got=first_line(error),
            allowed=f"the fields of {', '.join(c.__name__ for c in CONFIGS.values())}",
        ) from error


def load(folder: str | Path) -> nn.Module:
    """Return a saved net in evaluation mode and its saved precision; raises ParentError."""
    file = Path(folder) / "model.safetensors"
    model = build(load_config(folder))
    try:
        state = load_file(file)
        dtypes = {v.dtype for v in state.values() if v.is_floating_point()}
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ParentError(
            "the weights don't fit the net's config",
            where=str(file),
            got=" ".join(str(error).split())[:500],
            hint="save both with slimfuse.nets.save",
        ) from error
    return model


def _perceptron(name: str, inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    sizes = (inputs, *hidden, classes)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.ReLU()] * bool(layers) + [nn.Linear(a, b)]
    return nn.Sequential(OrderedDict([("flatten", nn.Flatten()), (name, nn.Sequential(*layers))]))


def _vgg(config: VGGConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels, side = config.channels, config.image_size
    for width in config.features:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            side //= 2
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] * config.batch_norm + [nn.ReLU()]
        channels = width
    if side < 1:
        raise ShapeError(
            "the poolings leave nothing of the image",
            where="features",
            got=f"{config.features.count('M')} poolings of {config.image_size} pixels",
        )
    head = _perceptron("classifier", prod((channels, side, side)), config.hidden, config.classes)
    parts = [("features", nn.Sequential(*layers)), *head.named_children()]
    return nn.Sequential(OrderedDict(parts))


class _Block(nn.Module):
    """Two convolutions beside the identity, or beside a 1 × 1 projection where a stage begins."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn1(self.conv1(x)).relu()
        after: Tensor = self.bn2(self.conv2(inside)) + self.shortcut(x)
        return after.relu()


class ResNet(nn.Module):
    """A residual net for small images; see ResNetConfig."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        width, inner = config.stages[0], iter(config.inner)
        self.conv1 = nn.Conv2d(config.channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        for stage, (outputs, blocks) in enumerate(zip(config.stages, config.blocks, strict=True)):
            parts: list[Any] = []
            for block in range(blocks):
                opens = block == 0 and stage > 0
                parts.append(_Block(width, next(inner), outputs, 2 if opens else 1, opens))
                width = outputs
            stages.append(nn.Sequential(*parts))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(width, config.classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        x = self.bn1(self.conv1(pixel_values)).relu()
        logits: Tensor = self.fc(self.stages(x).mean((-2, -1)))
        return logits
