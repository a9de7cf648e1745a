"""Masks of pruned weights: kept through training, saved beside the model, checked on loading."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimfuse.errors import StorageError, UserError

FILE = "masks.safetensors"
KIND = "slimfuse-masks-1"


class Masks(Mapping[str, Tensor]):
    """Which weights stay, bool tensors by their parameters' names; never changed once made."""

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        self._kept = {name: mask.detach().cpu().bool() for name, mask in kept.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def sparsity(self) -> float:
        """The share of zeros of all masked weights."""
        total = sum(mask.numel() for mask in self.values())
        return 1 - sum(int(mask.sum()) for mask in self.values()) / max(total, 1)

    def sparsities(self) -> dict[str, float]:
        """Return the share of zeros of every layer."""
        return {name: 1 - float(mask.double().mean()) for name, mask in self.items()}

    @classmethod
    def of_zeros(cls, model: nn.Module, names: Iterable[str]) -> Masks:
        """Return masks of the weights that aren't zero, for a model whose mask file is lost."""
        parameters = dict(model.named_parameters())
        return cls({name: parameters[name].detach() != 0 for name in names})

    def apply(self, model: nn.Module) -> None:
        """Set pruned weights to zero."""
        for parameter, mask in self._pairs(model):
            with torch.no_grad():
                parameter.masked_fill_(~mask.to(parameter.device), 0)

    def apply_gradients(self, model: nn.Module) -> None:
        """Set the gradients of pruned weights to zero, so that norms and moments don't see them."""
        for parameter, mask in self._pairs(model):
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask.to(parameter.device), 0)

    def holding(self, model: nn.Module) -> Callable[[], None]:
        """Return what to call after every `optimizer.step()`: it sets pruned weights to zero.

        Momentum and weight decay can't bring a weight back. No hook and no parametrisation: the
        model stays one of its stock class.
        """
        pairs = [(p, ~mask.to(p.device)) for p, mask in self._pairs(model)]

        def hold() -> None:
            with torch.no_grad():
                for parameter, gone in pairs:
                    parameter.masked_fill_(gone, 0)

        return hold

    def check(self, model: nn.Module) -> None:
        """Raise UserError that names every layer with a pruned weight that isn't zero."""
        bad = {
            name: int((p.detach()[~mask.to(p.device)] != 0).sum())
            for (p, mask), name in zip(self._pairs(model), self, strict=True)
        }
        if any(bad.values()):
            raise UserError(
                "pruned weights are not zero: the masks were lost in training or loading",
                got="; ".join(f"{name}: {count}" for name, count in bad.items() if count),
                hint="call masks.apply(model), or `holding` after every step of the optimizer",
            )

    def save(self, path: Path, **about: object) -> None:
        """Write the masks, one bit a weight, whole or not at all; about: JSON values to keep."""
        told = {**about, "shapes": {name: list(mask.shape) for name, mask in self.items()}}
        write_tensors(path, {name: pack(mask) for name, mask in self.items()}, KIND, told)

    @classmethod
    def load(cls, path: Path) -> Masks:
        """Return saved masks; raises StorageError for a file that isn't one of them."""
        try:
            tensors, told = read_tensors(path, KIND)
            found = {name: unpack(tensors[name], shape) for name, shape in told["shapes"].items()}
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise StorageError(
                "the masks can't be read", where=str(path), got=type(error).__name__,
                hint="`Masks.of_zeros` makes them anew from the model's zeros",
            ) from error  # fmt: skip
        return cls(found)

    def _pairs(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        parameters = dict(model.named_parameters())
        bad = [
            f"{name} {tuple(mask.shape)}"
            for name, mask in self.items()
            if name not in parameters or parameters[name].shape != mask.shape
        ]
        if bad:
            raise UserError("the masks are of another model", got="; ".join(bad),
                            allowed="the names and shapes of this model's parameters")  # fmt: skip
        return [(parameters[name], mask) for name, mask in self.items()]


def pack(mask: Tensor) -> Tensor:
    """Return a bool tensor as bits (ceil(n/8),), the first the lowest."""
    bits = torch.nn.functional.pad(mask.cpu().flatten().to(torch.uint8), (0, -mask.numel() % 8))
    packed: Tensor = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1)
    return packed.to(torch.uint8)


def unpack(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """Return what `pack` was given."""
    shape = tuple(shape)
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return flat.flatten()[: math.prod(shape)].view(shape).bool()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str, told: object) -> None:
    """Write a safetensors file with a JSON value so that it appears whole or not at all."""
    partial = path.with_suffix(".writing")  # a stage forgets it, and keeps the whole one
    held = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    # one entry: safetensors writes several in any order, and equal files shall have equal bytes
    save_file(held, partial, metadata={kind: json.dumps(told, sort_keys=True)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())  # else the name may outlive the content when the power fails
    partial.replace(path)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """Return what `write_tensors` wrote; raises KeyError for a file of another kind."""
    with safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {})[kind])
        return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118
