"""Leave-one-sequence-out errors against refits without the sequence."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor

from slimfuse.fuse.leave_out import UNTOUCHED, LeaveOut, Scores
from slimfuse.fuse.solve import ridge
from slimfuse.moments import Moments

STRENGTHS = (1e-6, 1e-3, 0.1, 3.0)
Rows = list[tuple[Tensor, Tensor, Tensor]]


def problem(seed: int, lengths: list[int], d: int, k: int, noise: float = 0.3) -> Rows:
    """Return sequences of correlated inputs, goals with an intercept, and uneven weights."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mix, weight, bias = draw(d, d), draw(k, d), draw(k)
    rows = []
    for t in lengths:
        x = draw(t, d) @ mix + 0.5 * draw(1, d) + 1.7
        y = x @ weight.T + bias + noise * draw(t, k)
        rows.append((x, y, torch.rand(t, generator=g, dtype=torch.float64) + 0.1))
    return rows


def moments(rows: Rows) -> Moments:
    x, y, _ = rows[0]
    out = Moments(x=x.shape[1], y=y.shape[1])
    for x, y, w in rows:
        out.update(w, x=x, y=y)
    return out


def fitted(rows: Rows, prior: Tensor, prior_bias: Tensor | None, groups: Rows) -> LeaveOut:
    m = moments(rows)
    out = LeaveOut(
        m.cov("y", "x"), m.cov("x"), m.mean("x"), m.mean("y"), m.weight, prior, prior_bias,
        STRENGTHS,
    )  # fmt: skip
    for x, y, w in groups:
        out.update(x, y, w)
    return out


def brute(rows: Rows, prior: Tensor, strength: float, judged: Rows) -> float:
    """Return the left-out error by solving each reduced problem anew, intercept as a column."""
    x = torch.cat([r[0] for r in rows])
    total = sum(float(r[2].sum()) for r in rows)
    weights = torch.cat([r[2] for r in rows])
    mean = (weights[:, None] * x).sum(0) / total
    gram = ((x - mean) * weights[:, None]).T @ (x - mean) / total
    penalty = total * strength * float(gram.diagonal().mean())
    d = x.shape[1]
    error = seen = 0.0
    for group in judged:
        rest = [r for r in rows if r is not group]
        a = torch.cat([torch.nn.functional.pad(r[0], (0, 1), value=1.0) for r in rest])
        y = torch.cat([r[1] - r[0] @ prior.T for r in rest])
        w = torch.cat([r[2] for r in rest])[:, None]
        damp = penalty * torch.eye(d + 1, dtype=torch.float64)
        damp[d, d] = 0  # the intercept is free
        if strength == inf:
            delta = torch.zeros(d + 1, y.shape[1], dtype=torch.float64)
            delta[d] = (w * y).sum(0) / w.sum()
        else:
            delta = torch.linalg.solve(a.T @ (w * a) + damp, a.T @ (w * y))
        gx, gy, gw = group
        left = gy - gx @ prior.T - torch.nn.functional.pad(gx, (0, 1), value=1.0) @ delta
        error += float((gw[:, None] * left.square()).sum())
        seen += float(gw.sum())
    return error / seen


@pytest.mark.parametrize("judged", [slice(None), slice(1, 4)])
def test_errors_equal_those_of_refits(judged: slice) -> None:
    rows = problem(0, [5, 9, 1, 7, 11, 6], d=7, k=3)
    prior = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)
    scores = fitted(rows, prior, None, rows[judged]).scores()
    for strength, error in zip(scores.strengths, scores.errors, strict=True):
        # two float64 solves of the same problem; condition number below 1e5
        assert error == pytest.approx(brute(rows, prior, strength, rows[judged]), rel=1e-10)
    assert scores.prior == pytest.approx(brute(rows, prior, inf, rows[judged]), rel=1e-10)
    assert scores.untouched is None
    assert (scores.groups, scores.rows) == (len(rows[judged]), sum(len(r[0]) for r in rows[judged]))


def about_zero(rows: Rows, prior: Tensor, groups: Rows) -> LeaveOut:
    """Return the judge of a layer without a bias."""
    m = moments(rows)
    none = torch.zeros(prior.shape[1]).double(), torch.zeros(len(prior)).double()
    out = LeaveOut(
        m.second("y", "x"), m.second("x"), *none, m.weight, prior, None, STRENGTHS,
        intercept=False,
    )  # fmt: skip
    for x, y, w in groups:
        out.update(x, y, w)
    return out


@pytest.mark.parametrize("judged", [slice(None), slice(1, 4)])
def test_errors_without_an_intercept_equal_those_of_refits(judged: slice) -> None:
    rows = problem(0, [5, 9, 1, 7, 11, 6], d=7, k=3)
    prior = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)
    found = about_zero(rows, prior, rows[judged])
    scores, second = found.scores(), moments(rows).second("x")
    total = sum(float(w.sum()) for _, _, w in rows)
    for strength, error in zip(scores.strengths, scores.errors, strict=True):
        penalty = total * strength * float(second.diagonal().mean()) * torch.eye(7).double()
        missed = seen = 0.0
        for group in rows[judged]:
            rest = [r for r in rows if r is not group]
            x, y, w = (torch.cat(parts) for parts in zip(*rest, strict=True))
            heavy = w[:, None] * x
            step = torch.linalg.solve(heavy.T @ x + penalty, heavy.T @ (y - x @ prior.T))
            gx, gy, gw = group
            missed += float((gw[:, None] * (gy - gx @ (prior + step.T).T).square()).sum())
            seen += float(gw.sum())
        # two float64 solves of the same problem; condition number below 1e5
        assert error == pytest.approx(missed / seen, rel=1e-10)
    plain = sum(float((w[:, None] * (y - x @ prior.T).square()).sum()) for x, y, w in rows[judged])
    assert scores.prior == pytest.approx(plain / seen, rel=1e-12)  # the prior has nothing to fit
    for strength in STRENGTHS:
        m = moments(rows)
        weight, bias = found.solution(strength)
        want = ridge(m.second("y", "x"), m.second("x"), prior, strength)
        torch.testing.assert_close(weight, want, rtol=1e-9, atol=1e-9)
        assert not bias.any()


def test_a_single_group_without_an_intercept_falls_back_on_the_prior() -> None:
    rows = problem(5, [9], d=4, k=2)
    prior = torch.zeros(2, 4, dtype=torch.float64)
    scores = about_zero(rows, prior, rows).scores()
    # with the group left out nothing but the prior is fitted, whatever the ridge
    assert scores.errors == pytest.approx((scores.prior,) * 4, rel=1e-6)


def test_more_inputs_than_rows() -> None:
    rows = problem(1, [3, 4, 2], d=13, k=5)
    prior = torch.zeros(5, 13, dtype=torch.float64)
    scores = fitted(rows, prior, None, rows).scores()
    for strength, error in list(zip(scores.strengths, scores.errors, strict=True))[1:]:
        # the weakest ridge is left out: there I - H is singular up to 1e-6
        assert error == pytest.approx(brute(rows, prior, strength, rows), rel=1e-9)


def test_solution_is_the_ridge_of_solve() -> None:
    rows = problem(2, [8, 9, 7], d=5, k=4)
    prior, bias = torch.ones(4, 5, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)
    m, fit = moments(rows), fitted(rows, prior, bias, rows)
    for strength in STRENGTHS:
        want = ridge(m.cov("y", "x"), m.cov("x"), prior, strength)
        weight, offset = fit.solution(strength)
        torch.testing.assert_close(weight, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(offset, m.mean("y") - want @ m.mean("x"), rtol=1e-9, atol=1e-9)
    assert torch.equal(fit.solution(inf)[0], prior)
    assert torch.equal(fit.solution(UNTOUCHED)[1], bias)


def test_untouched_and_bias_only_win_when_the_prior_is_the_truth() -> None:
    rows = problem(3, [4, 5, 6], d=9, k=2, noise=0.0)
    a = torch.cat([torch.nn.functional.pad(x, (0, 1), value=1.0) for x, _, _ in rows])
    truth = torch.linalg.lstsq(a, torch.cat([y for _, y, _ in rows])).solution.T
    weight, bias = truth[:, :9], truth[:, 9]
    off = fitted([(x, y + 0.5, w) for x, y, w in rows], weight, bias, []).solution(inf)
    torch.testing.assert_close(off[1], bias + 0.5, rtol=1e-9, atol=1e-9)
    rows = [(x, y + 0.5, w) for x, y, w in rows]
    scores = fitted(rows, weight, bias, rows).scores()
    assert scores.untouched == pytest.approx(2 * 0.5**2, rel=1e-9)  # k = 2 outputs, 0.5 off each
    g = torch.Generator().manual_seed(0)
    noise = [(x, torch.randn(y.shape, generator=g, dtype=torch.float64), w) for x, y, w in rows]
    zero = torch.zeros(2, 9, dtype=torch.float64)
    assert fitted(noise, zero, zero[:, 0], noise).scores().best == UNTOUCHED
    raised = [(x, y + 9, w) for x, y, w in noise]
    assert fitted(raised, zero, zero[:, 0], raised).scores().best in (STRENGTHS[-1], inf)


def test_double_descent_is_seen_and_avoided() -> None:
    d, k, few, many = 31, 3, 8, 100
    truth = problem(4, [4] * (few + many), d, k, noise=20.0)
    prior = torch.zeros(k, d, dtype=torch.float64)
    small = fitted(truth[:few], prior, None, truth[:few]).scores()  # 32 rows, 32 unknowns
    assert small.errors[0] > 3 * min(small.errors)
    assert small.best != STRENGTHS[0]
    large = fitted(truth[few:], prior, None, truth[few:]).scores()
    assert large.best in STRENGTHS[:3]
    assert large.errors[0] < small.error(small.best)


def test_ties_go_to_the_stronger_choice() -> None:
    assert Scores((0.1, 1.0), (2.0, 2.0), 2.0, 2.0, 3, 9).best == UNTOUCHED
    assert Scores((0.1, 1.0), (2.0, 2.0), 2.0, None, 3, 9).best == inf
    assert Scores((0.1, 1.0), (2.0, 2.0), 2.5, 3.0, 3, 9).best == 1.0
    assert Scores((0.1, 1.0), (1.9, 2.0), 2.5, 3.0, 3, 9).best == 0.1
    # a prior that is right: which error is the least is rounding
    tiny = Scores((0.1, 1.0), (3e-30, 2e-30), 1e-30, 4e-30, 3, 9, rounding=1e-24)
    assert tiny.best == UNTOUCHED


def test_a_single_group_leaves_nothing_to_fit() -> None:
    rows = problem(5, [9], d=4, k=2)
    prior = torch.zeros(2, 4, dtype=torch.float64)
    scores = fitted(rows, prior, None, rows).scores()
    assert scores.errors == (inf,) * 4 and scores.best == inf


def test_rows_without_weight_change_nothing() -> None:
    rows = problem(6, [5, 6, 7], d=4, k=2)
    padded = [
        (torch.cat([x, x + 5]), torch.cat([y, y - 3]), torch.cat([w, 0 * w])) for x, y, w in rows
    ]
    m, prior = moments(rows), torch.zeros(2, 4, dtype=torch.float64)
    args = (m.cov("y", "x"), m.cov("x"), m.mean("x"), m.mean("y"), m.weight, prior, None, STRENGTHS)
    found = []
    for groups in (padded, rows):
        judge = LeaveOut(*args)
        for group in groups:
            judge.update(*group)
        found.append(judge.scores())
    assert found[0] == found[1]
