"""Protected answers stay: exact at full energy, whatever trains, however it is interrupted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import images, logits, random_vit, shake, vit_config
from torch import Tensor, nn

from slimfuse.batch import Batch
from slimfuse.diagnose.curvature import difference, forecast, measured
from slimfuse.diagnose.isolation import (
    Protection,
    SquareRoot,
    mixed,
    protectable,
    subspaces,
)
from slimfuse.errors import UserError
from slimfuse.families import ViT
from slimfuse.finetune import loop
from slimfuse.finetune.loop import fit
from slimfuse.finetune.schedule import Schedule

OLD, NEW = images(3, seed=5), images(12, seed=6)
LABELS = torch.arange(12) % 7


def protected(model: nn.Module, energy: float = 1.0) -> Protection:
    return Protection(model, subspaces(model, lambda: [OLD[:2], OLD[2:]], energy=energy))


def adam(model: nn.Module, protection: Protection, steps: int) -> list[float]:
    """Train on other samples with plain Adam and decay, and return the losses."""
    protection.apply(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=3e-3, weight_decay=0.1)
    hold, found = protection.holding(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pixel_values=NEW).logits, LABELS)
        loss.backward()
        optimizer.step()
        hold()
        found.append(float(loss.detach()))
    return found


def wide() -> nn.Module:
    """A model that reads fewer tokens than it is wide, so that there is room."""
    return random_vit(hidden_size=48, intermediate_size=54)


def test_300_steps_of_adam_with_decay_leave_protected_logits() -> None:
    model = wide()
    before, other = logits(model, OLD), logits(model, NEW)
    protection = protected(model)
    assert 0 < protection.plasticity < 1
    losses = adam(model, protection, 300)
    assert losses[-1] < 0.2 * losses[0]  # the new samples were learnt
    assert (logits(model, OLD) - before).abs().max() <= 1e-10  # float64, a promise of the design
    assert (logits(model, NEW) - other).abs().max() > 1


def test_a_projected_gradient_alone_would_not_do() -> None:
    """The check sees the failure it is for: without the projected update decay moves answers."""
    model = wide()
    before, protection = logits(model, OLD), protected(model)
    protection.holding = lambda _model: lambda: None  # type: ignore[method-assign]
    adam(model, protection, 5)
    assert (logits(model, OLD) - before).abs().max() > 1e-4


def test_a_linear_model_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Linear(17, 5).double()
    x = torch.randn(7, 17, dtype=torch.float64)
    before = model(x).detach()
    protection = Protection(model, subspaces(model, lambda: [x]))
    (space,) = protection.spaces
    assert (space.rank, space.width) == (7, 18)  # with the bias' 1
    hold = protection.holding(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    hold()
    assert (model(x) - before).abs().max() <= 1e-13  # one projection in float64
    assert model.weight.detach().sub(protection.start["weight"]).abs().max() > 0.1


def test_full_rank_lets_nothing_move() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(30, 4, dtype=torch.float64)
    start = copy.deepcopy(model.state_dict())
    protection = Protection(model, subspaces(model, lambda: [x]))
    assert [s.rank for s in protection.spaces] == [5, 4] and protection.plasticity == 0
    hold = protection.holding(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    hold()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in start.items())


@pytest.mark.parametrize("rows", [3, 9, 40])
def test_the_streamed_root_has_the_singular_values_of_all_rows(rows: int) -> None:
    x = torch.randn(rows, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    root = SquareRoot(9)
    for part in x.split(4):
        root.update(part)
    values, directions = root.spectrum()
    want = torch.zeros(9, dtype=torch.float64)
    want[: min(rows, 9)] = torch.linalg.svdvals(x)
    torch.testing.assert_close(values, want, rtol=1e-12, atol=1e-12)  # QR in float64
    torch.testing.assert_close(
        (directions * values.square()) @ directions.T, x.T @ x, rtol=1e-12, atol=1e-12
    )


def test_a_small_direction_is_not_lost() -> None:
    """1e-9 of the largest: its square is nothing in the moment's eigenvalues."""
    x = torch.eye(5, dtype=torch.float64) * torch.tensor([1, 1, 1e-9, 0, 0])
    model = nn.Linear(5, 2, bias=False).double()
    (space,) = subspaces(model, lambda: [x])
    assert space.rank == 3


def test_energy_is_a_dial() -> None:
    model = wide()
    ranks = [[s.rank for s in subspaces(model, lambda: [OLD], energy=e)] for e in (0.5, 0.9, 1.0)]
    assert all(a <= b <= c for a, b, c in zip(*ranks, strict=True))
    assert sum(ranks[0]) < sum(ranks[1]) < sum(ranks[2])
    for space in subspaces(model, lambda: [OLD], energy=0.9):
        eye = torch.eye(space.directions.shape[1], dtype=torch.float64)
        torch.testing.assert_close(space.directions.T @ space.directions, eye, rtol=0, atol=1e-12)
        update = torch.randn(3, space.width, dtype=torch.float64)
        once = space.project(update)
        torch.testing.assert_close(space.project(once), once, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="not a share of energy"):
        subspaces(model, lambda: [OLD], energy=0)


def test_queries_keys_and_values_share_what_they_read() -> None:
    model = wide()
    groups = [s.layers for s in subspaces(model, lambda: [OLD])]
    assert sorted(name for group in groups for name in group) == sorted(protectable(model))
    together = next(g for g in groups if any(name.endswith("q_proj") for name in g))
    assert len(together) == 3


def test_padding_does_not_count_and_tied_heads_stay() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_positions=12, n_embd=18, n_layer=2, n_head=3)
    model = GPT2LMHeadModel(config).double().eval()
    assert "lm_head" not in protectable(model)  # it is the table of tokens, too
    tokens = torch.randint(0, model.config.vocab_size, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    spaces = subspaces(model, lambda: [Batch({"input_ids": tokens, "attention_mask": mask})])
    assert max(s.rank for s in spaces) == 8  # of ten tokens two only pad
    protection = Protection(model, spaces)
    protection.apply(model)
    assert not model.get_parameter("transformer.wte.weight").requires_grad
    before = model(tokens, attention_mask=mask).logits.detach()
    hold = protection.holding(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    hold()
    after = model(tokens, attention_mask=mask).logits.detach()
    assert (after - before)[mask.bool()].abs().max() < 1e-10  # Conv1D keeps (in, out)


# -- in the loop ----------------------------------------------------------------------------


def fitted(folder: Path, model: nn.Module, loss: loop.Loss, **more: float | int) -> list[float]:
    folder.mkdir(exist_ok=True)
    plan = Schedule(8, batch_size=5, lr=1e-2, weight_decay=0.3, seed=3, **more)  # type: ignore[arg-type]
    return fit(
        model, loss, 12, plan, precision="fp32", checkpoint=folder / "c.safetensors",
        what="testing", constraint=protected(model, 0.9999999999),
    ).losses  # fmt: skip


def learn(model: nn.Module, indices: Tensor) -> Tensor:
    like = next(model.parameters())
    rows = model(pixel_values=NEW[indices].to(like.dtype)).logits
    return 30 * nn.functional.cross_entropy(rows, LABELS[indices])  # its gradient is clipped


@pytest.mark.parametrize("more", [{}, {"ema": 0.5}, {"accumulate": 3}])
def test_the_loop_keeps_protected_answers(tmp_path: Path, more: dict[str, float]) -> None:
    model = wide()
    before, start = logits(model, OLD), logits(model, NEW)
    fitted(tmp_path, model, learn, **more)
    assert (logits(model, OLD) - before).abs().max() < 1e-4  # energy 1 - 1e-10
    assert (logits(model, NEW) - start).abs().max() > 0.1


class Killed(Exception):
    """What ends a training in the middle."""


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_killed_protected_training_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    def model() -> nn.Module:
        config = vit_config(hidden_size=48, intermediate_size=54)
        return shake(ViT().build(config), seed=0)

    more = {} if ema is None else {"ema": ema}
    undisturbed, killed, resumed = model(), model(), model()
    want = fitted(tmp_path / "whole", undisturbed, learn, **more)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    left = iter(range(4))

    def stopping(wrapped: nn.Module, indices: Tensor) -> Tensor:
        if next(left, None) is None:
            raise Killed
        return learn(wrapped, indices)

    with pytest.raises(Killed):
        fitted(tmp_path / "killed", killed, stopping, **more)
    torch.manual_seed(99)
    assert fitted(tmp_path / "killed", resumed, learn, **more) == want
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# -- what it costs, forecast and measured --------------------------------------------------


def test_forgetting_is_forecast() -> None:
    model = random_vit()
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in after.parameters():
            p.add_(1e-4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    batches = [(NEW[:5], LABELS[:5]), (NEW[5:], LABELS[5:])]
    told = forecast(model, batches, difference(model, after), "classes")
    rise, apart, most = measured(model, after, batches, "classes")
    # beyond g·δ + ½ δᵀGδ is the curvature of the answers themselves, which G leaves out
    assert told.total.value == pytest.approx(rise.value, rel=0.05)
    # a divergence has no such term: what is left is of third order
    assert told.quadratic.value == pytest.approx(apart.value, rel=1e-2)
    assert told.total.samples == 12 and 0 < most < 1


# -- the mixing rule -----------------------------------------------------------------------


def test_mixing_is_least_squares_on_all_tasks_inputs() -> None:
    generator = torch.Generator().manual_seed(4)
    x = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (9, 4)]
    w = [torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in x]
    found = mixed(w, [rows.T @ rows for rows in x])
    goals = torch.cat([rows @ one.T for rows, one in zip(x, w, strict=True)])
    want = torch.linalg.lstsq(torch.cat(x), goals).solution.T
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)  # normal equations, float64


def test_mixing_tasks_of_disjoint_inputs_forgets_neither() -> None:
    generator = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    x = [torch.randn(20, 3, generator=generator, dtype=torch.float64) @ q[:, :3].T,
         torch.randn(20, 4, generator=generator, dtype=torch.float64) @ q[:, 3:7].T]  # fmt: skip
    w = [torch.randn(2, 8, generator=generator, dtype=torch.float64) for _ in x]
    found = mixed(w, [rows.T @ rows / len(rows) for rows in x])
    for rows, one in zip(x, w, strict=True):
        torch.testing.assert_close(rows @ found.T, rows @ one.T, rtol=1e-10, atol=1e-10)
