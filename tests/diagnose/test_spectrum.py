"""Loss-weighted spectra against dense matrices; allocation against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_gauge import FAMILY, rebuilt, regauged
from tiny import images, logits, random_vit
from torch import Tensor

from slimfuse.diagnose.spectrum import Drawn, Spectrum, allocate, spectra, weighted_spectrum
from slimfuse.fuse.canonical import canonical


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def test_it_is_the_spectrum_of_the_dense_product() -> None:
    x, y = normal(30, 7, seed=1), normal(20, 7, seed=2) @ normal(7, 7, seed=3)
    a, g = x.T @ x / 30, y.T @ y / 20
    dense = torch.linalg.eigvalsh(root(a) @ g @ root(a)).flip(0)
    torch.testing.assert_close(weighted_spectrum(x, y)[:7], dense, rtol=1e-9, atol=1e-12)


def test_no_replacement_of_its_rank_costs_less_than_the_tail() -> None:
    x, y = normal(40, 6, seed=4), normal(40, 6, seed=5) * torch.tensor([3, 2, 1, 1, 0.5, 0.1])
    a, g = x.T @ x / 40, y.T @ y / 40
    found = Spectrum("s", weighted_spectrum(x, y), 6, 40)
    _, vectors = torch.linalg.eigh(root(g) @ a @ root(g))
    for rank in range(1, 6):
        for seed in range(50):
            q = torch.linalg.qr(normal(6, rank, seed=100 + seed)).Q
            gap = torch.eye(6, dtype=torch.float64) - q @ q.T
            cost = float(torch.trace(g @ gap @ a @ gap.T)) / 2
            assert cost >= found.tail(rank) - 1e-12
        # and the best one comes to it: projection in the norm of G
        top = vectors[:, -rank:]
        best = torch.linalg.inv(root(g)) @ top @ top.T @ root(g)
        gap = torch.eye(6, dtype=torch.float64) - best
        cost = float(torch.trace(g @ gap @ a @ gap.T)) / 2
        assert cost == pytest.approx(found.tail(rank), rel=1e-8, abs=1e-12)


def test_planted_redundancy_is_found() -> None:
    """Half of an MLP's units are copies of the other half's sums: its rank is what is left."""
    model = random_vit(hidden_size=12, num_attention_heads=3, intermediate_size=16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "fc1" in name:
                p[8:] = p[:8]
    down = next(n for n, _ in model.named_modules() if n.endswith("fc2"))
    batches = [(images(6, seed=s), None) for s in (1, 2)]
    (found,), count = spectra(model, batches, {"mlp": down}, "classes")
    assert count == 12 and found.width == 16
    assert found.effective(1 - 1e-12) == 8
    assert found.tail(8) < 1e-12 * found.tail(0) < float("inf")


def test_another_basis_changes_neither_logits_nor_spectra() -> None:
    """Stream and heads turned, heads and units permuted: λ of A G doesn't see A → T A Tᵀ."""
    model = random_vit()
    layout = FAMILY.layout(model.config)
    sites = {path: path for block in layout.blocks for path in (block.o, block.down)}
    sites["read"] = layout.head
    found = []
    for state in (canonical(model, FAMILY), regauged(model)):
        other = rebuilt(model, state)
        # float64: a dozen products of order 1
        torch.testing.assert_close(
            logits(other, images(4)), logits(model, images(4)), rtol=0, atol=1e-10
        )
        found.append(spectra(other, [(images(5), None)], sites, "classes")[0])
    for one, two in zip(*found, strict=True):
        assert one.name == two.name and float(one.values[0]) > 0
        torch.testing.assert_close(two.values, one.values, rtol=1e-8, atol=1e-12)


def test_the_samples_loss_is_what_spectra_are_in() -> None:
    """tr(A G)/2, by dense derivatives of each sample's divergence."""
    model = random_vit(hidden_size=6, num_attention_heads=2, intermediate_size=5)
    x = images(8)
    head = next(n for n, _ in model.named_modules() if n.endswith("classifier"))
    (found,), _ = spectra(model, [(x, None)] * 60, {"read": head}, "classes")
    weight = model.get_parameter(f"{head}.weight").detach()
    share = model(x).logits.detach().softmax(1)
    seen: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _m, g: seen.append(g[0]))
    model(x)
    handle.remove()
    read = seen[0].detach()
    a = read.T @ read / 8
    h = torch.stack([torch.diag(p) - torch.outer(p, p) for p in share]).mean(0)
    want = float(torch.trace(a @ weight.T @ h @ weight)) / 2
    assert found.tail(0) == pytest.approx(want, rel=0.3)  # 480 rows of each


def test_greedy_is_the_best_of_all() -> None:
    found = [
        Spectrum(f"{i}", normal(6, seed=20 + i).exp().sort(descending=True).values, 6, 99)
        for i in range(3)
    ]
    for budget in range(3, 19):
        got = allocate(found, [1, 1, 1], budget, floor=1 / 6)
        best = min(
            sum(s.tail(w) for s, w in zip(found, widths, strict=True))
            for widths in product(range(1, 7), repeat=3)
            if sum(widths) <= budget
        )
        assert got.rise == pytest.approx(best) and sum(got.widths) <= budget


def test_a_floor_and_the_trust_region() -> None:
    flat = Spectrum("flat", torch.full((8,), 1e-6, dtype=torch.float64), 8, 99)
    steep = Spectrum("steep", torch.full((8,), 1.0, dtype=torch.float64), 8, 99)
    got = allocate([flat, steep], [1, 1], 8, floor=0.25)
    assert got.widths == (2, 6) and not got.trusted  # two lost directions of ½ nat each
    assert allocate([flat, steep], [1, 1], 10, floor=0.25).trusted
    assert Spectrum("none", torch.zeros(4), 4, 9).effective(0.99) == 0


def test_a_draw_holds_so_many_rows_and_each_as_often() -> None:
    generator = torch.Generator().manual_seed(0)
    times = torch.zeros(12)
    for _ in range(3000):
        drawn = Drawn(4)
        for part in torch.arange(12.0)[:, None].split(5):
            drawn.add(part, generator)
        assert drawn.seen == 12 and drawn.rows.shape == (4, 1)
        times[drawn.rows[:, 0].long()] += 1
    # each stays with probability 1/3: 1 000 of 3 000, five standard deviations are 129
    assert bool(((times - 1000).abs() < 129).all())


def test_fewer_rows_than_a_draw_holds_all_stay() -> None:
    drawn, generator = Drawn(9), torch.Generator().manual_seed(0)
    rows = torch.arange(6.0).view(3, 2)
    drawn.add(rows[:2], generator)
    drawn.add(rows[2:], generator)
    assert torch.equal(drawn.rows, rows)
