"""Finite-step kernels map the distributions of their path onto each other exactly."""

import pytest
import torch

from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource, UnigramSource
from dfm.rates.kernels import (
    Routes,
    backward_kernel,
    farthest_kappa,
    forward_kernel,
    frozen_kernel,
    largest_beta,
    mixed_kernel,
    remask_kernel,
    reversal_kernel,
)
from tests.dfm.toys import Toy, dirichlet, times

V = 4
MASK = V - 1
SOURCES = {"mask": MaskSource(V, MASK), "uniform": UniformSource(V), "unigram": UnigramSource(dirichlet(V, seed=3))}
K, K_NEXT = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (0.3, 0.8))
EYE = torch.eye(V, dtype=torch.float64)


def distribution_of(source) -> torch.Tensor:
    return source.probabilities(EYE)


def distribution_at(source, k: torch.Tensor, x1: int) -> torch.Tensor:
    return (1 - k[0, 0]) * distribution_of(source) + k[0, 0] * EYE[x1]


def applied(routes: Routes, source, start: torch.Tensor, x1: int) -> torch.Tensor:
    """The distribution [V] after the kernel, given x1; with a mask source the data are where carry-over would put them."""
    z = torch.arange(V)[:, None]
    p1 = EYE[x1].expand(V, 1, V)
    if source.mask_id is not None:
        p1 = torch.where((z == MASK)[..., None], p1, EYE[z])
    distribution = routes.distribution(z, p1, distribution_of(source))
    assert torch.allclose(distribution.sum(-1), torch.ones((), dtype=torch.float64))
    assert distribution[start > 0].min() > -1e-12  # a state of probability 0 may have anything
    return start @ distribution[:, 0]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("x1", range(V - 1))
def test_forward_and_backward_are_exact_for_any_step(source, x1):
    here, there = distribution_at(source, K, x1), distribution_at(source, K_NEXT, x1)
    assert torch.allclose(applied(forward_kernel(K, K_NEXT), source, here, x1), there, atol=1e-12)
    assert torch.allclose(applied(backward_kernel(K, K_NEXT), source, there, x1), here, atol=1e-12)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_mixed_is_exact_up_to_the_largest_beta(source):
    limit = largest_beta(K, K_NEXT, source.mask_id is not None)
    for share in (0.0, 0.5, 1.0):
        routes = mixed_kernel(K, K_NEXT, share * limit)
        assert torch.allclose(
            applied(routes, source, distribution_at(source, K, 1), 1), distribution_at(source, K_NEXT, 1), atol=1e-12
        )
    largest = mixed_kernel(K, K_NEXT, limit)
    both = torch.maximum(*largest) if source.mask_id is not None else sum(largest)  # a mask source uses one at a time
    assert torch.allclose(both, torch.ones_like(both))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("k", [0.0, 0.2, 0.8, 1.0])
def test_frozen_leaves_the_distribution_at_any_strength_up_to_1(source, k):
    k = torch.full((1, 1, 1), k, dtype=torch.float64)
    here, is_mask = distribution_at(source, k, 1), source.mask_id is not None
    for strength in (0.3, 1.0):
        assert torch.allclose(applied(frozen_kernel(k, strength, is_mask), source, here, 1), here, atol=1e-12)
    if 0 < k < 1:
        assert max(float(r.max()) for r in frozen_kernel(k, 1.0, is_mask)) > 0.19


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_reversal_is_exact_given_the_data_and_on_the_mean(source):
    for x1 in range(V - 1):
        routes = reversal_kernel(K, K_NEXT, torch.arange(V)[:, None], distribution_of(source))
        moved = applied(routes, source, distribution_at(source, K, x1), x1)
        assert torch.allclose(moved, distribution_at(source, K_NEXT, x1), atol=1e-12)
    path = MixturePath(source, PowerScheduler())
    toy = Toy(path, length=1, tokens=V - 1)
    state = toy.everywhere(0.3)
    p1 = toy.reachable(toy.posterior(state.x, state.t), state)
    distribution = reversal_kernel(K, K_NEXT, state.x, distribution_of(source)).distribution(
        state.x, p1, distribution_of(source)
    )[:, 0]
    assert torch.allclose(toy.marginal(times(0.3)[0]) @ distribution, toy.marginal(times(0.8)[0]), atol=1e-12)


def test_reversal_equals_bayes():
    source, x1 = SOURCES["unigram"], 2
    a = K / K_NEXT
    ends = distribution_at(source, K_NEXT, x1)
    joint = ends[:, None] * (a[0, 0] * EYE + (1 - a[0, 0]) * distribution_of(source))  # [x_s, x_t]
    routes = reversal_kernel(K, K_NEXT, torch.arange(V)[:, None], distribution_of(source))
    distribution = routes.distribution(torch.arange(V)[:, None], EYE[x1].expand(V, 1, V), distribution_of(source))[:, 0]
    assert torch.allclose(distribution, (joint / joint.sum(0)).T, atol=1e-12)


def test_reversal_of_the_mask_source_is_forward():
    z = torch.full((1, 1), MASK)
    reversal, forward = reversal_kernel(K, K_NEXT, z, distribution_of(SOURCES["mask"])), forward_kernel(K, K_NEXT)
    assert torch.allclose(reversal.data[..., :MASK], forward.data, atol=1e-12)


def test_remasking_reveals_the_scheduled_share_and_contains_the_mixed_kernel():
    source = SOURCES["mask"]
    for k_next in (0.35, 0.7):
        k_next = torch.full_like(K, k_next)
        for share in (0.0, 0.4, 1.0):
            sigma = share * ((1 - k_next) / K).clamp_max(1)
            moved = applied(remask_kernel(K, k_next, sigma), source, distribution_at(source, K, 1), 1)
            assert torch.allclose(moved, distribution_at(source, k_next, 1), atol=1e-12)
    beta = torch.tensor(0.4, dtype=torch.float64)
    remask, mixed = remask_kernel(K, K_NEXT, beta * (K_NEXT - K) / K), mixed_kernel(K, K_NEXT, beta)
    assert all(torch.allclose(a, b) for a, b in zip(remask, mixed, strict=True))


def test_the_step_bound_is_where_the_largest_beta_is_reached():
    for beta in (0.0, 0.5, 4.0):
        beta = torch.full_like(K, beta)
        bound = farthest_kappa(K, beta)
        assert torch.allclose(
            mixed_kernel(K, bound, beta).data + mixed_kernel(K, bound, beta).noise, torch.ones_like(K)
        )
        assert torch.allclose(largest_beta(K, bound, is_mask=False), beta)
    zero = torch.zeros_like(K)
    assert farthest_kappa(zero, torch.ones_like(K)).item() == 1.0
