"""The state of a training on disk: written whole or not at all, read back exactly."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from slimfuse.finetune.several import like, whole


@dataclass
class Progress:
    """How far a training is.

    losses: of every step, nan where it was skipped; bad: how many steps in a row were skipped;
    halvings: of the rate; best: the value, and the step behind which it was measured; watched: how
    many measurements since then were no better; stopped: whether it has ended early.
    """

    losses: list[float] = field(default_factory=list)
    bad: int = 0
    halvings: int = 0
    best: float = float("nan")
    best_step: int = 0
    watched: int = 0
    stopped: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Return it as tensors."""
        rest = (self.bad, self.halvings, self.best, self.best_step, self.watched, self.stopped)
        return {
            "history": torch.tensor(self.losses, dtype=torch.float64),
            "progress": torch.tensor([float(x) for x in rest], dtype=torch.float64),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Progress:
        """Return what `tensors` wrote."""
        bad, halvings, best, best_step, watched, stopped = tensors["progress"].tolist()
        losses = tensors["history"].tolist()
        return cls(losses, int(bad), int(halvings), best, int(best_step), int(watched),
                   bool(stopped))  # fmt: skip


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that appears whole under its name or not at all."""
    temporary = path.with_suffix(".writing")  # a stage forgets it, and keeps the whole one
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # else the name may outlive the content when the power fails
    temporary.replace(path)


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    progress: Progress,
    write: bool = True,
) -> None:
    """Write a training's state, the same file however many processes train.

    write: whether this process does; where tensors are spread over all, all have to call.

    The order of the samples and the random numbers of a step follow from the seed and the step,
    and its rate from the step and the halvings: so the number of steps stands for the sampler,
    the generators and the schedule.
    """
    tensors = {f"model.{k}": whole(v) for k, v in model.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": whole(v) for k, v in state.items()}
    if average is not None:
        tensors |= {f"average.{k}": whole(v) for k, v in average.state_dict().items()}
    if write:
        write_tensors(tensors | progress.tensors(), path)


def restore(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None
) -> Progress:
    """Read a training's state; a file that is damaged is removed, and nothing was done."""
    try:
        tensors = load_file(path)
    except (SafetensorError, FileNotFoundError):  # start over rather than stop
        path.unlink(missing_ok=True)  # another process may have been faster
        return Progress()

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    _load(model, part("model."))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = like(value, parameters[int(index)])
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    if average is not None:
        _load(average, part("average."))
    return Progress.of(tensors)


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict({k: like(v, own.get(k, v)) for k, v in tensors.items()})
