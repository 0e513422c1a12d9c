"""Schedulers: ends, slopes, inverses, and what is optimal or constant about the special ones."""

import math

import pytest
import torch

from dfm.paths.beta_schedules import ConstantSpeedBeta, PowerBeta
from dfm.paths.schedulers import (
    CallableScheduler,
    CosineScheduler,
    CubicScheduler,
    KineticOptimalScheduler,
    PiecewiseLinearScheduler,
    PowerScheduler,
)
from tests.dfm.toys import dirichlet, times

SCHEDULERS = {
    "linear": PowerScheduler(),
    "square": PowerScheduler(2.0),
    "cosine": CosineScheduler(),
    "cubic": CubicScheduler(2.0, 2.0),
    "cubic-steep": CubicScheduler(0.5, 3.0),
    "kinetic-mask": KineticOptimalScheduler(0.0),
    "kinetic-uniform": KineticOptimalScheduler(1 / 7),
    "piecewise": PiecewiseLinearScheduler((0.0, 0.1, 0.5, 1.0)),
    "callable": CallableScheduler(lambda t: t**3, lambda t: 3 * t**2),
}
GRID = torch.linspace(0, 1, 102, dtype=torch.float64)  # misses the corners of the piecewise one


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rises_from_0_to_1_with_its_slope_and_inverse(scheduler):
    kappa = scheduler.kappa(GRID)
    assert abs(kappa[0]) < 1e-15 and abs(kappa[-1] - 1) < 1e-12
    assert (kappa.diff() >= 0).all()
    inner = GRID[1:-1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(scheduler.kappa(inner).sum(), inner)
    assert torch.allclose(scheduler.dkappa(inner), slope, atol=1e-10)
    assert torch.allclose(scheduler.inverse(kappa), GRID, atol=1e-10)
    assert torch.allclose(scheduler.log_survival(GRID[:-1]), (1 - kappa[:-1]).log(), atol=1e-12)


def test_cubic_is_accepted_exactly_where_it_never_falls():
    accepted = 0
    for a in range(13):
        for b in range(13):
            start, end = a * 0.37, b * 0.37  # no point lies on the border of the region
            rises = ((3 * (start + end - 2) * GRID + 2 * (3 - 2 * start - end)) * GRID + start >= -1e-12).all()
            try:
                CubicScheduler(start, end)
            except ValueError as error:
                assert not rises and "start_slope" in str(error)
            else:
                assert rises
                accepted += 1
    assert 0 < accepted < 169


def test_kinetic_optimal_walks_the_fisher_rao_geodesic_at_constant_speed():
    p, x1 = dirichlet(6), 2
    scheduler = KineticOptimalScheduler(p[x1].item())
    kappa = scheduler.kappa(GRID)[:, None]
    root = ((1 - kappa) * p + kappa * torch.eye(6, dtype=torch.float64)[x1]).sqrt()
    angle = (root @ root.T).clamp(-1, 1).acos()
    whole = p[x1].sqrt().acos()
    assert torch.allclose(angle, (GRID[:, None] - GRID).abs() * whole, atol=1e-7)  # acos loses half the digits at 1


def test_kinetic_optimal_of_the_mask_source_is_a_squared_sine_of_fisher_speed_pi():
    scheduler, t = KineticOptimalScheduler(0.0), GRID[1:-1]
    k = scheduler.kappa(t)
    assert torch.allclose(k, (math.pi * t / 2).sin() ** 2)
    assert torch.allclose(scheduler.dkappa(t) / (k * (1 - k)).sqrt(), torch.tensor(math.pi).double())


def test_kinetic_optimal_of_a_distribution_takes_each_token_its_own():
    p = dirichlet(4)
    x1, t = torch.tensor([[0, 3, 3]]), times(0.3)[:, None]
    each = KineticOptimalScheduler(p).at(x1).kappa(t)
    alone = [KineticOptimalScheduler(p[token].item()).kappa(times(0.3)) for token in (0, 3, 3)]
    assert torch.allclose(each, torch.stack(alone, dim=1))


def test_a_callable_must_rise_and_bring_its_own_derivative():
    with pytest.raises(ValueError, match="function must rise from 0 to 1"):
        CallableScheduler(lambda t: 1 - t, lambda t: -torch.ones_like(t))
    with pytest.raises(ValueError, match="derivative must be that of function"):
        CallableScheduler(lambda t: t**2, lambda t: t)


@pytest.mark.parametrize("values", [(0.0, 0.6, 0.5, 1.0), (0.1, 1.0), (0.0, 0.9), (0.0,)])
def test_piecewise_values_must_rise_from_0_to_1(values):
    with pytest.raises(ValueError, match="values must rise from 0 to 1"):
        PiecewiseLinearScheduler(values)


@pytest.mark.parametrize("schedule", [PowerBeta(3.0, 0.9), PowerBeta(1.0, 5.0)])
def test_beta_has_its_slope(schedule):
    t = GRID[1:-1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.beta(t).sum(), t)
    assert torch.allclose(schedule.dbeta(t), slope)
    assert schedule.beta(times(0.0, 1.0)).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("average", [False, True])
def test_constant_speed(average):
    distances = dirichlet(18).reshape(3, 6) * 10
    distances[torch.arange(3), torch.arange(3)] = 0
    source = dirichlet(6, seed=1)
    schedule = ConstantSpeedBeta.fit(distances, source, average=average)
    t = (torch.arange(20, 900, 40, dtype=torch.float64) + 0.5) / 999  # middles of cells of the table
    for x1 in range(1 if average else 3):
        mine = schedule.at(torch.full((len(t),), x1))
        beta = mine.beta(t)[:, None, None]
        p = (source.log() - beta * distances).softmax(-1)
        variance = (p * (distances - (p * distances).sum(-1, keepdim=True)) ** 2).sum(-1)
        speed = mine.dbeta(t) * (variance.mean(-1) if average else variance[:, x1]).sqrt()
        assert speed.std() / speed.mean() < 1e-3
        end = (source.log() - mine.beta(times(1.0).expand(len(t)))[0] * distances[x1]).softmax(-1)
        assert end[x1] > 1 - 1e-6
