"""Fitted schedules: the exact curve of a Markov chain, the best cuts, smoothing, and what the excess means."""

import itertools
import math

import pytest
import torch

from dfm.paths.fit import FittedSchedule, fit_schedule, isotonic_decreasing
from dfm.sampling.grid import time_grid
from tests.dfm.toys import dirichlet, entropy, times


def chain_curve(n: int = 128, vocab: int = 20, stay: float = 0.9) -> torch.Tensor:
    """L(j) of a stationary chain with P = stay I + (1 - stay) / vocab: exact, from the nearest visible neighbours."""
    gap = torch.arange(n + 1, dtype=torch.float64)
    same, other = stay**gap + (1 - stay**gap) / vocab, (1 - stay**gap) / vocab

    def information(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.clamp_min(1e-300).log())

    one_side = information(same) + (vocab - 1) * information(other)
    a, b = gap.long()[:, None], gap.long()[None]
    both = (a + b).clamp_max(n)
    equal = torch.stack([same[a] * same[b], *([other[a] * other[b]] * (vocab - 1))], -1)
    unequal = torch.stack([same[a] * other[b], other[a] * same[b], *([other[a] * other[b]] * (vocab - 2))], -1)
    h = same[both] * information(equal / equal.sum(-1, keepdim=True)).sum(-1)
    h += (vocab - 1) * other[both] * information(unequal / unequal.sum(-1, keepdim=True)).sum(-1)

    def log_choose(m: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        value = torch.lgamma(m + 1) - torch.lgamma(j + 1) - torch.lgamma(m - j + 1)
        return torch.where((j >= 0) & (m >= j), value, -torch.inf)

    curve = []
    for j in torch.arange(n, dtype=torch.float64):
        whole = log_choose(torch.tensor(n - 1.0, dtype=torch.float64), j)
        inner = ((a > 0) & (b > 0) & (a + b < n)) * (n - a - b)
        total = torch.where(inner > 0, inner * h * (log_choose(n - 1.0 - a - b, j - 2) - whole).exp(), 0).sum()
        # i positions without a visible one on one side, the nearest on the other side at distance b
        i = gap.long()[:n, None]
        edge = (b > 0) & (i + b <= n - 1)
        total += 2 * (edge * one_side[b] * (log_choose(n - 1.0 - i - b, j - 1) - whole).exp()).sum()
        total += n * math.log(vocab) * (j == 0)
        curve.append(total / n)
    return torch.stack(curve)


@pytest.fixture(scope="module")
def curve() -> torch.Tensor:
    return chain_curve()


def test_curve_of_the_chain(curve):
    assert abs(curve[0] - 2.9957) < 1e-4 and abs(curve[127] - 0.1901) < 1e-4
    assert (curve.diff() < 0).all()


@pytest.mark.parametrize(
    ("rounds", "uniform", "cosine", "fitted"),
    [(8, 25.71, 15.86, 13.39), (16, 11.04, 6.70, 5.60), (32, 4.51, 2.73, 2.04)],
)
def test_excess_of_three_schedules(curve, rounds, uniform, cosine, fitted):
    n = len(curve)
    even = FittedSchedule(tuple(n * k // rounds for k in range(rounds + 1)))
    cosine_cuts = {
        round(n * (1 - math.cos(math.pi * k / rounds / 2))) for k in range(rounds + 1)
    }  # some rounds are empty
    curved = FittedSchedule(tuple(sorted(cosine_cuts)))
    for schedule, expected in ((even, uniform), (curved, cosine), (fit_schedule(curve, rounds), fitted)):
        assert abs(schedule.excess(curve) - expected) < 0.01


def test_no_cuts_are_better_than_the_fitted_ones():
    losses = dirichlet(8, seed=2).sort(descending=True).values
    for rounds in range(1, 9):
        choices = itertools.combinations(range(1, 8), rounds - 1)
        best = min(FittedSchedule((0, *cuts, 8)).excess(losses) for cuts in choices)
        assert fit_schedule(losses, rounds).excess(losses) == pytest.approx(best, abs=1e-12)


def test_excess_is_the_mean_kl_over_orders():
    distribution = dirichlet(8, concentration=0.4).reshape(2, 2, 2)

    def given(visible: tuple[int, ...], i: int) -> float:
        def of(keep):
            hidden = [d for d in range(3) if d not in keep]
            return entropy(distribution.sum(hidden) if hidden else distribution) if keep else 0.0

        return of((*visible, i)) - of(visible)

    losses = times(*(
        sum(given(v, i) for i in range(3) for v in itertools.combinations([k for k in range(3) if k != i], j))
        / (3 * math.comb(2, j))
        for j in range(3)
    ))  # fmt: skip
    schedule = FittedSchedule((0, 2, 3))
    kl = 0.0
    for order in itertools.permutations(range(3)):
        spent = given((), order[0]) + given((), order[1]) + given(order[:2], order[2])
        kl += (spent - entropy(distribution)) / 6
    assert schedule.excess(losses) == pytest.approx(kl, abs=1e-12)


def test_quotas_become_a_scheduler():
    schedule = FittedSchedule((0, 1, 4, 10))
    assert schedule.quotas == (1, 3, 6)
    kappa = schedule.kappa(torch.tensor(time_grid(3), dtype=torch.float64))
    assert torch.allclose(kappa, times(0.0, 0.1, 0.4, 1.0))
    assert torch.allclose(schedule.dkappa(times(0.1, 0.5, 0.9)), times(0.3, 0.9, 1.8))


def test_a_scheduler_is_fitted():
    losses = torch.tensor([3.0, 1.0, 0.5, 0.4, 0.4])
    assert fit_schedule(losses, 2) == FittedSchedule((0, 1, 5))


def test_saved_and_loaded(tmp_path):
    schedule = FittedSchedule((0, 1, 4, 10))
    schedule.save(tmp_path / "schedule.json")
    assert FittedSchedule.load(tmp_path / "schedule.json") == schedule
    for text in ("cuts", "[0, 1]", '{"cut": [0, 1]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="other.json' must be a JSON object with 'cuts'"):
            FittedSchedule.load(tmp_path / "other.json")
    with pytest.raises(ValueError, match="nowhere.json' does not exist"):
        FittedSchedule.load(tmp_path / "nowhere.json")


def test_settings_are_checked():
    with pytest.raises(ValueError, match="cuts must be rising"):
        FittedSchedule((0, 3, 3))
    with pytest.raises(ValueError, match="rounds must be a whole number from 1 to 4, got 5"):
        fit_schedule(torch.ones(4), 5)
    with pytest.raises(ValueError, match="losses must be 10 numbers"):
        FittedSchedule((0, 10)).excess(torch.ones(3))


def test_isotonic_is_the_nearest_falling_curve():
    generator = torch.Generator().manual_seed(0)
    values = torch.linspace(3, 1, 12, dtype=torch.float64) + torch.randn(12, generator=generator, dtype=torch.float64)
    weights = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    fitted = isotonic_decreasing(values, weights)
    assert (fitted.diff() <= 1e-12).all() and (values.diff() > 0).any()

    def loss(curve: torch.Tensor) -> torch.Tensor:
        return (weights * (curve - values) ** 2).sum()

    for _ in range(300):  # the problem is convex: no falling curve nearby may be better
        other = isotonic_decreasing(fitted + 0.1 * torch.randn(12, generator=generator, dtype=torch.float64))
        for share in (0.01, 0.3, 1.0):
            assert loss(torch.lerp(fitted, other, share)) >= loss(fitted) - 1e-12
