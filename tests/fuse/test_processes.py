"""A refit in two real processes (gloo), each with its share of the batches, is that of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from families.cases import EVERY, Case, logits
from ranks import RANKS, start
from safetensors.torch import load_file, save_file
from tiny_decoders import DECODERS, NARROW, build, config_of, decoder, ids
from torch import Tensor, nn

from slimfuse.batch import Inputs
from slimfuse.families import Family
from slimfuse.fuse.refit import Parent, Settings, refit
from slimfuse.moments import Moments
from slimfuse.saliency.parallel import Processes

BATCH, SAMPLES = 9, 40  # five batches: shares of three and two, the last batch smaller
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64 sums in another order
Made = dict[str, Tensor]


def made(
    family: Family, parents: list[nn.Module], target: nn.Module, x: Inputs, ranks: Processes,
    random_features: bool = False,
) -> Made:  # fmt: skip
    """Return the weights of a refit, the shares of variance that it missed, and its choices."""
    chunks = x.split(BATCH)
    named = [Parent(f"p{i}", model) for i, model in enumerate(parents)]
    done = refit(
        named, target, family, lambda: chunks, Settings(), n_batches=len(chunks), ranks=ranks,
        random_features=random_features,
    )  # fmt: skip
    told = [[p.error, p.left_out or 0.0, p.kept or 0.0] for p in done.parts]
    return {k: v.clone() for k, v in target.state_dict().items()} | {
        "told": torch.tensor(told, dtype=torch.float64),
        "stream": torch.tensor(done.stream_errors, dtype=torch.float64),
    }


def declared(case: Case, ranks: Processes, samples: int = SAMPLES, control: bool = False) -> Made:
    parents = [case.parent(seed) for seed in (0, 1)]
    torch.manual_seed(0)
    target = case.family.build(case.family.narrow(parents[0].config, case.narrow)).double()
    found = made(case.family, parents, target, case.batch(samples), ranks, control)
    if case.name == "vit-body":  # where the constant part of the answers points is rounding's
        del found["layernorm.bias"], found["pooler.dense.bias"]
        found["cosines"] = logits(target, case.batch(5))
    return found


def decoded(name: str, ranks: Processes) -> Made:
    family = DECODERS[name]
    torch.manual_seed(0)
    target = build(family, config_of(family, NARROW, key_heads=2))
    parents = [decoder(family, seed) for seed in (0, 1)]
    return made(family, parents, target, ids(SAMPLES), ranks)


# pre-norm; post-norm with a pooler; embeddings of another width; without a head; masked words
SOME = ("vit", "bert", "electra-19", "vit-body", "bert-body", "bert-words")
NAMES = {case.name: case for case in EVERY if case.name in SOME}
REFITS: dict[str, Callable[[Processes], Made]] = {
    **{name: partial(declared, case) for name, case in NAMES.items()},
    **{name: partial(decoded, name) for name in ("llama", "gemma3")},
    "one batch": partial(declared, NAMES["vit"], samples=BATCH),
    "control": partial(declared, NAMES["vit"], control=True),
}


def rows(ranks: Processes, batches: int) -> Made:
    """Return moments of batches of different sizes and far from nought, the last one empty."""
    generator = torch.Generator().manual_seed(0)
    every = [torch.randn(n, 7, generator=generator).double() + 1e4 for n in (5, 3, 11, 0)]
    weights = [torch.rand(len(x), generator=generator).double() for x in every]
    moments = Moments(torch.float64, ranks.sum if ranks.of > 1 else None, x=4, y=3)
    pairs = list(zip(every, weights, strict=True))[:batches]
    for x, w in ranks.share(lambda: pairs)():
        moments.update(w, x=x[:, :4], y=x[:, 4:])
    seen = {"x": moments.mean("x"), "xy": moments.cov("x", "y"), "yy": moments.second("y")}
    return seen | {"weight": torch.tensor(moments.weight)}


MOMENTS = {f"{n} batches": partial(rows, batches=n) for n in (1, 2, 3, 4)}


def in_one(accelerator: Accelerator, root: Path) -> None:
    ranks = Processes(accelerator)
    for name, work in (REFITS | MOMENTS).items():
        save_file(work(ranks), root / f"{name}.{ranks.index}")
    late = Moments(torch.float64, ranks.sum, x=2)
    late.update(x=torch.ones(3, 2))
    late.mean("x")
    with pytest.raises(AssertionError, match="after the sums were shared"):
        late.update(x=torch.ones(3, 2))
    (root / f"done.{ranks.index}").touch()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes found."""
    root = tmp_path_factory.mktemp("ranks")
    start(in_one, root)
    assert all((root / f"done.{rank}").exists() for rank in range(RANKS))
    return root


@pytest.mark.parametrize("name", [*REFITS, *MOMENTS])
def test_two_processes_find_what_one_finds(name: str, ran: Path) -> None:
    first, second = (load_file(ran / f"{name}.{rank}") for rank in range(RANKS))
    whole = (REFITS | MOMENTS)[name](Processes())
    assert first.keys() == second.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(first[key], second[key]), key  # the same bytes
        torch.testing.assert_close(first[key], value, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", REFITS)
def test_signs_of_eigenvectors_choose_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may return either sign, and sums in another order may turn it round."""
    found, generator = torch.linalg.eigh, torch.Generator().manual_seed(0)

    def flipped(matrix: Tensor) -> Any:
        values, vectors = found(matrix)
        signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
        return torch.return_types.linalg_eigh((values, vectors * signs))

    usual = REFITS[name](Processes())
    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    other = REFITS[name](Processes())
    for key, value in usual.items():
        torch.testing.assert_close(other[key], value, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")
