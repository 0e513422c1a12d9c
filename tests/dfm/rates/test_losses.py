"""Losses: the likelihood bounds, integrated over t, against -log p(x1)."""

import math

import numpy as np
import pytest
import torch

from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import CosineScheduler, PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource
from dfm.rates.conditional import KineticOptimalVelocity, ReversalVelocity
from dfm.rates.losses import denoising_loss, generalised_kl, rate_bound, stratified_times
from dfm.rates.velocities import ForwardVelocity
from tests.dfm.toys import Toy, times

V = 4
DATA = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
PATHS = {
    "mask": MixturePath(MaskSource(V + 1, V), PowerScheduler()),
    "mask-cosine": MixturePath(MaskSource(V + 1, V), CosineScheduler()),
    "uniform": MixturePath(UniformSource(V), PowerScheduler()),
    "uniform-cosine": MixturePath(UniformSource(V), CosineScheduler()),
}


def toy_of(path: MixturePath, length: int) -> Toy:
    toy = Toy(path, length, V)
    if length == 1:
        toy.data[:V] = DATA
    return toy


def bounds(toy: Toy, loss, points: int = 50) -> torch.Tensor:
    """The bound for every text x1 [S], exact over X_t, by Gauss-Legendre over a t that is dense at both ends."""
    total = torch.zeros(len(toy.states), dtype=torch.float64)
    states, count = toy.states, len(toy.states)
    for node, share in zip(*np.polynomial.legendre.leggauss(points), strict=True):
        u = torch.tensor((1 + node) / 2, dtype=torch.float64)
        t, weight = u * u * (3 - 2 * u), share / 2 * 6 * u * (1 - u)
        reach = toy.reach(t)
        state = toy.everywhere(t.item())
        p1 = toy.reachable(toy.posterior(states, state.t), state)
        every_z = states.repeat(count, 1)  # row x1 * count + z
        every_x1, every_p1 = states.repeat_interleave(count, 0), p1.repeat(count, 1, 1)
        value = loss(every_z, every_x1, t.repeat(count * count), every_p1).sum(-1).reshape(count, count)
        total += weight * (reach * torch.where(reach > 0, value, 0)).sum(-1)
    return total


def kl(toy: Toy):
    return lambda z, x1, t, p1: generalised_kl(p1.log(), z, x1, t, toy.path)


def with_rates(velocity):
    return lambda z, x1, t, p1: rate_bound(velocity.at(z, x1, t), velocity.marginal(z, t, p1), z)


@pytest.mark.parametrize("name", ["mask", "mask-cosine"])
def test_generalised_kl_is_tight_for_the_mask_source(name):
    toy = toy_of(PATHS[name], 1)
    assert torch.allclose(bounds(toy, kl(toy))[:V], -DATA.log(), atol=1e-6)


def test_generalised_kl_is_loose_for_the_uniform_source_and_reversal_tight():
    toy = toy_of(PATHS["uniform"], 1)
    forward, reversal = bounds(toy, kl(toy)), bounds(toy, with_rates(ReversalVelocity(toy.path)))
    assert (forward > -DATA.log() + 0.01).all()
    assert abs(forward[0] - 2.98) < 0.01
    assert abs(reversal[0] - 2.30) < 0.01
    assert torch.allclose(reversal, -DATA.log(), atol=1e-4)


def test_bound_depends_on_the_rates_not_on_the_scheduler():
    values = []
    for name in ("uniform", "uniform-cosine"):
        toy = toy_of(PATHS[name], 1)
        values.append(bounds(toy, kl(toy)))
    assert torch.allclose(values[0], values[1], atol=1e-4)


@pytest.mark.parametrize("name", ["mask", "uniform"])
def test_mean_bound_of_two_positions_is_at_least_the_entropy(name):
    toy = toy_of(PATHS[name], 2)
    clean = toy.data > 0
    entropy = -(toy.data[clean] * toy.data[clean].log()).sum()
    mean = (toy.data * bounds(toy, kl(toy), 20))[clean].sum()
    assert mean > entropy - 1e-3
    if name == "mask":
        assert abs(mean - entropy) < 1e-3  # with the exact posterior
    else:
        assert mean > entropy + 0.1


def test_a_wrong_posterior_costs_more():
    toy = toy_of(PATHS["mask"], 1)
    right, wrong = kl(toy), lambda z, x1, t, p1: generalised_kl((p1**0.5).log(), z, x1, t, toy.path)
    assert (toy.data * (bounds(toy, wrong) - bounds(toy, right))).sum() > 0.02


@pytest.mark.parametrize("name", PATHS)
def test_general_rates_contain_the_generalised_kl(name):
    path = PATHS[name]
    toy = toy_of(path, 1)
    state = toy.everywhere(0.35)
    p1 = toy.reachable(toy.posterior(state.x, state.t), state)
    for x1 in range(V):
        data = torch.full_like(state.x, x1)
        reached = path.marginal(data, state.t).gather(-1, state.x[..., None])[:, 0, 0] > 0
        expected = generalised_kl(p1.log(), state.x, data, state.t, path)
        for velocity in (ForwardVelocity(path), KineticOptimalVelocity(path)):
            general = with_rates(velocity)(state.x, data, state.t, p1)
            assert torch.allclose(general[reached], expected[reached], atol=1e-12)


def test_mask_generalised_kl_is_weighted_cross_entropy():
    path, x1 = PATHS["mask-cosine"], torch.tensor([[1, 2]])
    logits = torch.randn(1, 2, V + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[..., V] = -torch.inf
    t = times(0.3)
    weight = path.scheduler.dkappa(t) / (1 - path.scheduler.kappa(t))
    loss = generalised_kl(logits, torch.full_like(x1, V), x1, t, path)
    assert torch.allclose(loss, weight * denoising_loss(logits, x1))
    assert denoising_loss(logits, x1)[0, 1].item() == pytest.approx(-logits.log_softmax(-1)[0, 1, 2].item())


def test_times_are_stratified_and_keep_off_the_pole():
    t = stratified_times(1000, torch.Generator().manual_seed(0))
    assert (t.sort().values - torch.arange(1000) / 1000).abs().max() < 2e-3
    assert t.max() < 1 - 1e-3 and math.isclose(t.mean(), 0.4995, abs_tol=1e-3)
    assert (t.diff() > 0).any() and (t.diff() < 0).any()
