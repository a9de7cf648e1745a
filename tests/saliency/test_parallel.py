"""Two real processes (gloo): the sums, and what is decided by them, are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from ranks import RANKS, start
from safetensors.torch import load_file, save_file
from saliency.asked import asked_vit
from saliency.small_nets import Pair, loss, mlp, pairs, singles
from torch import Tensor, nn

from slimfuse.errors import SlimfuseError, UserError
from slimfuse.saliency import score, sparsify_state
from slimfuse.saliency.fisher import Part, accumulate, agreed
from slimfuse.saliency.gradients import Share, drawn
from slimfuse.saliency.losses import against_labels
from slimfuse.saliency.mask_fisher import branches
from slimfuse.saliency.parallel import Processes
from slimfuse.saliency.patterns import prunable
from slimfuse.saliency.sparsify import Sparsified, sparsify, weight_scores
from slimfuse.saliency.sparsify_spec import Spec

DATA = pairs(7, 6, 4)  # seven batches of one sample: shares of four and of three
WIDTHS = (6, 8, 4)
SPEC = Spec(0.6, "woodtaylor", block=5, steps=2)
CLOSE = 1e-12  # float64 sums in another order, through blocks of 5 damped by 1e-2
Result = dict[str, Tensor]


class Killed(Exception):
    """A process that ends between two steps."""


def pruned(ranks: Processes, path: Path | None = None, between: Any = None) -> Result:
    """Prune by seven batches and return masks and weights by name."""
    model = mlp(*WIDTHS)
    found = sparsify(model, loss, ranks.share(lambda: singles(DATA)), SPEC, reduce=ranks.sum,
                     checkpoint=path, main=ranks.main, between=between)  # fmt: skip
    return kept(model, found)


def kept(model: nn.Module, found: Sparsified) -> Result:
    masks = {f"mask.{name}": found.masks[name].to(torch.uint8) for name in found.masks}
    return masks | {f"weight.{name}": p.detach() for name, p in model.named_parameters()}


def sums(ranks: Processes, route: Any, batches: list[Pair], by: Any = loss) -> Result:
    """Return Grams or diagonals, first moments, counts and mean squares; the layers are cut."""
    model = mlp(*WIDTHS)
    parts = [Part(la, 5, s, s + 3) for la in prunable(model) for s in (0, 3)]
    reduce = None if ranks.of == 1 else ranks.sum
    made = accumulate(model, by, ranks.share(lambda: batches)(), parts, route, first=True,
                      reduce=reduce)  # fmt: skip
    out: Result = {}
    for key, own in made.items():
        told = torch.tensor([own.count, own.mean_diagonal], dtype=torch.float64)
        width = own.part.weights.stop - own.part.weights.start
        blocks = slice(0, -(-width // 5))
        inverse = own.inverse(blocks, 0.1).diagonal()
        out |= {f"{key}.told": told, f"{key}.first": own.mean_gradient(), f"{key}.f": inverse}
    return out


def structured(ranks: Processes, samples: int = 12) -> Result:
    """Return what the mask Fisher and Taylor say of a tiny ViT, and its branches."""
    asked = asked_vit(samples, loss=against_labels)
    labels = torch.arange(samples) % 7
    whole = [(x, y) for x, y in zip(asked.examples(), labels.split(5), strict=True)]
    asked = replace(asked, examples=ranks.share(lambda: whole), reduce=ranks.sum)
    found = {f"{n}.{s}": v for n in ("mask-fisher", "taylor") for s, v in score(n, asked).items()}
    attention, mlps = branches(asked)
    return found | {"attention": attention.clone(), "mlp": mlps.clone()}


def scores(ranks: Processes, count: int) -> Result:
    model = mlp(*WIDTHS)
    spec = Spec(0.5, "woodfisher", block=5, route="gram")
    batches = ranks.share(lambda: singles(DATA)[:count])
    return weight_scores(model, loss, batches, spec, reduce=ranks.sum)


CASES: dict[str, Callable[[Processes], Result]] = {
    "pruned": pruned,
    "gram": lambda ranks: sums(ranks, "gram", singles(DATA)),
    "diagonal": lambda ranks: sums(ranks, "diagonal", singles(DATA)),
    "gram of one batch": lambda ranks: sums(ranks, "gram", singles(DATA)[:1]),
    "drawn labels": lambda ranks: sums(
        ranks, "gram", singles(DATA), drawn(lambda model, pair: model(pair[0]))
    ),
    "scores": lambda ranks: scores(ranks, 7),
    "scores of one batch": lambda ranks: scores(ranks, 1),
    "structured": structured,
    "structured, one batch": lambda ranks: structured(ranks, 5),
}


def in_one(accelerator: Accelerator, root: Path) -> None:
    """Do everything as one of two processes."""
    ranks, rank = Processes(accelerator), accelerator.process_index
    for name, case in CASES.items():
        save_file(case(ranks), root / f"{name}.{rank}")

    wrote: list[str] = []
    write = sparsify_state.write_tensors
    sparsify_state.write_tensors = lambda path, *more: (wrote.append(path.name), write(path, *more))  # type: ignore[assignment, func-returns-value, return-value]

    def kill(*_: object) -> None:
        raise Killed

    with_file = root / "checkpoint"
    with pytest.raises(Killed):
        pruned(ranks, with_file, kill)
    save_file(pruned(ranks, with_file, lambda *_: None), root / f"resumed.{rank}")
    assert bool(wrote) == ranks.main

    with pytest.raises(Killed):  # its first step is done, and half of the processes know
        pruned(ranks, root / "half", kill)
    own = root / ("half" if ranks.main else "elsewhere")
    save_file(pruned(ranks, own), root / f"half known.{rank}")

    assert not agreed(rank, ranks.sum) and agreed(7, ranks.sum)
    other = mlp(*WIDTHS, seed=rank)  # not one model
    with pytest.raises(SlimfuseError, match="decided differently"):
        sparsify(other, loss, list, Spec(0.5, "magnitude"), reduce=ranks.sum)
    with pytest.raises(UserError, match="no batch"):
        scores(ranks, 0)
    (root / f"done.{rank}").touch()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes found."""
    root = tmp_path_factory.mktemp("ranks")
    start(in_one, root)
    return root


def alone() -> Processes:
    """Return one process, as without a launcher."""
    return Processes(Accelerator(cpu=True))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_finds(name: str, ran: Path) -> None:
    first, second = (load_file(ran / f"{name}.{rank}") for rank in range(RANKS))
    whole = CASES[name](alone())
    assert first.keys() == second.keys() == whole.keys() and first
    for key, value in whole.items():
        assert torch.equal(first[key], second[key]), key  # the same bytes
        torch.testing.assert_close(first[key], value, rtol=CLOSE, atol=CLOSE)


def test_two_processes_keep_the_same_weights_as_one(ran: Path) -> None:
    whole = pruned(alone())
    first = load_file(ran / "pruned.0")
    masks = [k for k in whole if k.startswith("mask.")]
    assert len(masks) == 2 and all(torch.equal(first[k], whole[k]) for k in masks)
    share = sum(int(whole[k].sum()) for k in masks) / sum(whole[k].numel() for k in masks)
    assert share == pytest.approx(0.4, abs=0.01)  # of 80 weights


@pytest.mark.parametrize("name", ["resumed", "half known"])
def test_a_killed_run_ends_with_the_same_bytes_everywhere(name: str, ran: Path) -> None:
    whole = load_file(ran / "pruned.0")
    for rank in range(RANKS):
        found = load_file(ran / f"{name}.{rank}")
        assert all(torch.equal(found[key], value) for key, value in whole.items())


def test_every_process_got_to_its_end(ran: Path) -> None:
    assert all((ran / f"done.{rank}").exists() for rank in range(RANKS))


def test_alone_nothing_changes() -> None:
    ranks, value = alone(), torch.ones(3)
    assert ranks.sum(value) is value and ranks.main
    assert [*ranks.share(lambda: [1, 2, 3])()] == [1, 2, 3]


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_shares_are_all_batches_each_once(of: int) -> None:
    batches = list("abcd")
    shares = [Share(batches, index, of) for index in range(of)]
    assert sorted(pair for s in shares for pair in s.numbered()) == [*enumerate(batches)]
    assert max(map(len, map(list, shares))) - min(map(len, map(list, shares))) <= 1


@pytest.mark.parametrize("name", ["energy", "ziplm", "diagonal-fisher"])
def test_scorers_that_are_not_summed_are_refused(name: str) -> None:
    asked = replace(asked_vit(), reduce=lambda tensor: tensor)
    with pytest.raises(UserError, match="isn't summed") as error:
        score(name, asked)
    able = {"magnitude", "l1", "random", "mask-fisher", "taylor"}
    assert {*str(error.value.allowed).split(", ")} == able
