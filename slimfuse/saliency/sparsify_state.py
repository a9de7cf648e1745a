"""How far a sparsification is, in one file that a killed run goes on from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from slimfuse.errors import SlimfuseError
from slimfuse.saliency.fisher import Reduce, agreed
from slimfuse.saliency.masks import pack, read_tensors, unpack, write_tensors
from slimfuse.saliency.patterns import Layer
from slimfuse.saliency.sparsify_plan import joined, of

KIND = "slimfuse-sparsify-2"


@dataclass(frozen=True)
class StepRecord:
    """One step: the share of zeros after it, and the loss that the quadratic model expects of it.

    increase: None where nothing was made of the Fisher.
    """

    step: int
    sparsity: float
    increase: float | None


@dataclass(frozen=True)
class LayerRecord:
    """What a layer lost: how many of its weights stay, and what the last step says of it.

    increase: of the loss by the quadratic model; damping: λ; None where there was no Fisher.
    saliency: the share of the scores of what the last step began with that stays; None of N:M,
    where groups have none.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    increase: float | None
    damping: float | None
    saliency: float | None = None

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.kept / self.weights


@dataclass
class State:
    """What is done of the schedule. A step's weights reach the model only at its end.

    step: whole steps done; kept: masks (d,) at the step's beginning, in the pattern's order;
    scores, new: of the step's parts by their keys; costs, dampings: likewise; mean: of g² over all
    layers, where one threshold compares them; layers: what the last whole step made of them;
    records: of the steps.
    """

    step: int
    kept: dict[str, Tensor]
    scores: dict[str, Tensor] = field(default_factory=dict)
    new: dict[str, Tensor] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    dampings: dict[str, float] = field(default_factory=dict)
    mean: float | None = None
    layers: list[LayerRecord] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)

    def end(self, layers: Sequence[Layer], chosen: Mapping[str, Tensor]) -> None:
        """Keep what a step chose, and did to every layer and to all; forget its parts."""
        self.layers = [
            LayerRecord(
                la.name, la.shape, la.size, int(chosen[la.name].sum()),
                _total(v for k, v in self.costs.items() if of(k, la)),
                next((v for k, v in self.dampings.items() if of(k, la)), None),
                self._held(la, chosen[la.name]),
            )
            for la in layers
        ]  # fmt: skip
        kept, total = (sum(getattr(r, n) for r in self.layers) for n in ("kept", "weights"))
        increase = _total(self.costs.values())
        self.records.append(StepRecord(self.step + 1, 1 - kept / total, increase))
        self.kept = dict(chosen)
        for part in (self.scores, self.new, self.costs, self.dampings):
            part.clear()
        self.mean = None

    def _held(self, layer: Layer, chosen: Tensor) -> float | None:
        """Return the share of a layer's scores that the weights chosen (d,) hold."""
        scores = joined(self.scores, layer)
        if scores.dtype == torch.bool:
            return None
        size = layer.size // len(scores)
        kept, stays = (one.cpu().view(-1, size).any(1) for one in (self.kept[layer.name], chosen))
        total = scores[kept].sum()
        return float(scores[stays].sum() / total) if float(total) > 0 else None

    def save(self, path: Path, model: nn.Module, digest: str) -> None:
        """Write the state and the model, whole or not at all."""
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"kept.{k}": pack(v) for k, v in self.kept.items()}
        tensors |= {f"score.{k}": v for k, v in self.scores.items()}
        tensors |= {f"new.{k}": v for k, v in self.new.items()}
        told = {
            "digest": digest, "step": self.step, "costs": self.costs, "dampings": self.dampings,
            "mean": self.mean,
            "layers": [asdict(r) for r in self.layers],
            "records": [asdict(r) for r in self.records],
        }  # fmt: skip
        write_tensors(path, tensors, KIND, told)


def _total(values: Iterable[float]) -> float | None:
    """Return a sum that doesn't depend on the order, None of nothing."""
    found = list(values)
    return math.fsum(found) if found else None


def restore(path: Path, model: nn.Module, layers: Sequence[Layer], digest: str) -> State | None:
    """Return a saved state and put its weights into the model; None where there is none for us.

    A file of other settings, or damaged on disk, counts as none: the work starts over.
    """
    if not path.exists():
        return None
    try:
        tensors, told = read_tensors(path, KIND)
    except (SafetensorError, KeyError, ValueError):
        return None
    if told["digest"] != digest:
        return None

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    bits = part("kept.")
    return State(
        told["step"], {la.name: unpack(bits[la.name], (la.size,)) for la in layers},
        part("score."), part("new."), told["costs"], told["dampings"], told["mean"],
        [LayerRecord(**r | {"shape": tuple(r["shape"])}) for r in told["layers"]],
        [StepRecord(**r) for r in told["records"]],
    )  # fmt: skip


def content(path: Path | None) -> int:
    """Return a number below 2³² that tells a file's content, 0 where there is none."""
    if path is None or not path.exists():
        return 0
    with path.open("rb") as file:
        return int.from_bytes(hashlib.file_digest(file, "sha256").digest()[:4], "big")


def check_alike(tensors: Iterable[Tensor], reduce: Reduce) -> None:
    """Raise SlimfuseError in all processes where not all have the same bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if not agreed(int.from_bytes(found.digest()[:4], "big"), reduce):
        raise SlimfuseError(
            "processes decided differently about the same sums",
            hint="give all one model, one spec and as many threads, on machines of one kind",
        )


def fingerprint(*parts: object) -> str:
    """Return what a checkpoint's settings are told apart by."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def noise_of(layer: Layer, seed: int) -> Tensor:
    """Return uniform random numbers (d,) of a layer, the same whatever the other layers are."""
    own = int.from_bytes(hashlib.sha256(layer.name.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + own)
    return torch.rand(layer.size, generator=generator, dtype=torch.float64)
