"""Training in two real processes (gloo): the steps, files and ends of one process."""

from __future__ import annotations

import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ranks import RANKS, start
from safetensors.torch import load_file, save_file
from tiny import shake, vit_config
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.errors import Terminated, UserError
from slimfuse.families import ViT
from slimfuse.finetune import loop, several
from slimfuse.finetune.checkpoint import Progress
from slimfuse.finetune.distill import labels_loss
from slimfuse.finetune.loop import Loss, fit
from slimfuse.finetune.lora import adapted
from slimfuse.finetune.schedule import Schedule
from slimfuse.finetune.validate import Validation
from slimfuse.interrupt import terminate
from slimfuse.tasks import ImageClassification

SAMPLES, STEPS, FEW, HALF = 37, 20, 9, 5
# the last batch of an epoch has 4 samples, so that shares are of 6 and 5, and of 2
PLAN = Schedule(FEW, batch_size=11, lr=1e-2, seed=3, dropout=False, clip=0.5)
LOSS = {"rtol": 1e-5, "atol": 1e-6}  # float32 means in another order, over 20 steps
WEIGHTS = {"rtol": 1e-3, "atol": 1e-4}  # AdamW divides by what is rounding where nothing moves


def vit() -> nn.Module:
    config = vit_config(hidden_size=6, num_attention_heads=2, intermediate_size=7)
    net = ViT().build(config)
    net.pooler = nn.Linear(6, 6)  # nothing reads it: DDP would wait for its gradient
    return shake(net, seed=0)


def learn() -> Loss:
    x = torch.randn(SAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(SAMPLES) % 7
    return labels_loss(ImageClassification(), lambda i: (Batch({"pixel_values": x[i]}), labels[i]))


def train(
    file: Path, plan: Schedule = PLAN, loss: Loss | None = None, held_out: Validation | None = None
) -> tuple[nn.Module, Progress]:
    net = vit()
    return net, fit(
        net, loss or learn(), SAMPLES, plan, precision="fp32", checkpoint=file, what="testing",
        validation=held_out,
    )  # fmt: skip


def adapters(file: Path) -> tuple[nn.Module, Progress]:
    """Train low-rank adapters of the blocks and merge them."""
    net, family = vit(), ViT()
    blocks = [block.path for block in family.blocks(net.config)]
    with adapted(net, blocks, rank=2, alpha=4.0, seed=7, whole=("classifier",)):
        progress = fit(
            net, learn(), SAMPLES, PLAN, precision="fp32", checkpoint=file, what="testing"
        )
    return net, progress


def result(net: nn.Module, progress: Progress) -> dict[str, Tensor]:
    # a constant over keys leaves the softmax as it was, so that these biases move by rounding
    moved = {k: v for k, v in net.state_dict().items() if not k.endswith("k_proj.bias")}
    return moved | {"losses": torch.tensor(progress.losses, dtype=torch.float64)}


class Stopped(Exception):
    """What ends a training in the middle, in all processes at once."""


def stopping(after: int) -> Loss:
    """Return a loss that can be asked for so many steps only."""
    loss, steps = learn(), iter(range(after))

    def stop(net: nn.Module, indices: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not isinstance(net, nn.parallel.DistributedDataParallel):
            spread = any(hasattr(p, "full_tensor") for p in net.parameters())
            if several_here() and not spread:
                return loss(net, indices)  # the look at which parameters are used
        if next(steps, None) is None:
            raise Stopped
        return loss(net, indices)

    return stop


def several_here() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def every_step_saved() -> Iterator[None]:
    before = loop.CHECKPOINT_SECONDS
    loop.CHECKPOINT_SECONDS = 0.0
    try:
        yield
    finally:
        loop.CHECKPOINT_SECONDS = before


def begun(file: Path, plan: Schedule = PLAN) -> Path:
    """Train for some steps and leave the checkpoint."""
    with every_step_saved(), pytest.raises(Stopped):
        train(file, plan, stopping(HALF))
    return file


def held_out() -> Validation:
    x = torch.randn(9, 3, 6, 6, generator=torch.Generator().manual_seed(5))

    def measure(net: nn.Module) -> float:
        return float(nn.functional.cross_entropy(net(x).logits, torch.arange(9) % 7))

    return Validation(measure, larger=False, every=4)


CASES: dict[str, Callable[[Path], tuple[nn.Module, Progress]]] = {
    "plain": lambda root: train(root / "plain.safetensors", replace(PLAN, steps=STEPS)),
    "parts": lambda root: train(root / "parts.safetensors", replace(PLAN, accumulate=3)),
    "averaged": lambda root: train(root / "averaged.safetensors", replace(PLAN, ema=0.9)),
    "the best": lambda root: train(root / "best.safetensors", held_out=held_out()),
    "adapters": lambda root: adapters(root / "adapters.safetensors"),
    "by turns": lambda root: train(begun(root / "turns.safetensors")),
}


def ddp(accelerator: Accelerator, root: Path) -> None:
    rank = accelerator.process_index
    for name, case in CASES.items():
        save_file(result(*case(root)), root / f"{name}.{rank}")
    begun(root / "for one.safetensors")
    accelerator.wait_for_everyone()
    save_file(result(*train(root / "by one.safetensors")), root / f"by one.{rank}")

    broken, seen = learn(), iter(range(100))

    def once(net: nn.Module, indices: Tensor) -> Tensor:
        value = broken(net, indices)
        bad = next(seen) == 4 and rank == 1  # in one process only; the first is the look
        return value * math.inf if bad else value

    _, progress = train(root / "broken.safetensors", PLAN, once)
    assert [math.isnan(v) for v in progress.losses] == [i == 3 for i in range(FEW)]

    signal.signal(signal.SIGTERM, terminate)
    steps, plain = iter(range(100)), learn()

    def told(net: nn.Module, indices: Tensor) -> Tensor:
        if next(steps) == 5 and rank == 1:  # to one process only
            signal.raise_signal(signal.SIGTERM)
        return plain(net, indices)

    with pytest.raises(Terminated):
        train(root / "ended.safetensors", loss=told)
    accelerator.wait_for_everyone()
    assert len(load_file(root / "ended.safetensors")["history"]) == 5

    own = root / ("ended.safetensors" if rank == 0 else "elsewhere")
    with pytest.raises(UserError, match="don't read the same checkpoint"):
        train(own)
    (root / f"done.{rank}").touch()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes trained with DDP, one of them from one's checkpoint."""
    root = tmp_path_factory.mktemp("ranks")
    begun(root / "by one.safetensors")
    start(ddp, root)
    return root


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys() and len(want["losses"]) in (FEW, STEPS)
    torch.testing.assert_close(found["losses"], want["losses"], **LOSS)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, **WEIGHTS)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_steps_of_one(name: str, ran: Path, tmp_path: Path) -> None:
    first, second = (load_file(ran / f"{name}.{rank}") for rank in range(RANKS))
    assert all(torch.equal(first[key], second[key]) for key in first)  # the same bytes
    same(first, result(*CASES[name](tmp_path)))


def test_training_moves_what_is_used_and_leaves_the_rest(ran: Path) -> None:
    start, found = vit().state_dict(), load_file(ran / "plain.0")
    still = {name for name, value in found.items() if name in start
             and torch.equal(value, start[name])}  # fmt: skip
    assert still == {"pooler.weight", "pooler.bias"}


def test_one_process_goes_on_from_the_checkpoint_of_two(ran: Path, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    shutil.copyfile(ran / "for one.safetensors", file)
    assert len(load_file(file)["history"]) == HALF
    same(result(*train(file)), result(*train(tmp_path / "whole.safetensors")))


def test_two_processes_go_on_from_the_checkpoint_of_one(ran: Path, tmp_path: Path) -> None:
    same(load_file(ran / "by one.0"), result(*train(tmp_path / "whole.safetensors")))


def test_every_process_got_to_its_end(ran: Path) -> None:
    """A step that isn't finite in one process, SIGTERM to one, and two files are met by both."""
    assert all((ran / f"done.{rank}").exists() for rank in range(RANKS))


# -- FSDP2 --------------------------------------------------------------------------------


def fsdp2(accelerator: Accelerator, root: Path) -> None:
    """Accelerate spreads weights on cards only: its state is told that these are some."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ViTLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator.state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    # of the patch embeddings' output, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    rank, spread = accelerator.process_index, []
    prepare = several.spreads
    loop.spreads = lambda *a, **k: spread.append(prepare(*a, **k)) or spread[-1]  # type: ignore[attr-defined]
    for name, case in CASES.items():
        save_file(result(*case(root)), root / f"{name}.{rank}")
    assert spread and all(spread)
    begun(root / "for one.safetensors")
    accelerator.wait_for_everyone()
    save_file(result(*train(root / "by one.safetensors")), root / f"by one.{rank}")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes trained with FSDP2."""
    root = tmp_path_factory.mktemp("spread")
    begun(root / "by one.safetensors")
    start(fsdp2, root)
    return root


@pytest.mark.parametrize("name", CASES)
def test_spread_weights_make_the_steps_of_one_process(
    name: str, spread: Path, tmp_path: Path
) -> None:
    first, second = (load_file(spread / f"{name}.{rank}") for rank in range(RANKS))
    assert all(torch.equal(first[key], second[key]) for key in first)
    same(first, result(*CASES[name](tmp_path)))


def test_checkpoints_of_spread_weights_are_whole(spread: Path, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    shutil.copyfile(spread / "for one.safetensors", file)
    whole = result(*train(tmp_path / "whole.safetensors"))
    same(result(*train(file)), whole)
    same(load_file(spread / "by one.0"), whole)
