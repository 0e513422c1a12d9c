"""Velocities: each produces its path, sum_z u(x, z) p_t(z) = d p_t(x) / dt, given the data and on the mean over it."""

import pytest
import torch

from dfm.paths.beta_schedules import PowerBeta
from dfm.paths.metric import EmbeddingDistance, MetricPath
from dfm.paths.mixture import ConvexSumPath, MixturePath
from dfm.paths.schedulers import CosineScheduler, CubicScheduler, KineticOptimalScheduler, PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource, UnigramSource
from dfm.rates.conditional import KineticOptimalVelocity, MetricVelocity, ReversalVelocity, UniformWeightVelocity
from dfm.rates.velocities import BackwardVelocity, ConvexVelocity, CorrectorVelocity, ForwardVelocity, check_rates
from tests.dfm.toys import Toy, dirichlet, times

V = 4
UNIGRAM = UnigramSource(dirichlet(V, seed=3))
DISTANCE = EmbeddingDistance(torch.randn(V, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
MIXTURES = {
    "mask": MixturePath(MaskSource(V, V - 1), PowerScheduler(2.0)),
    "uniform": MixturePath(UniformSource(V), CubicScheduler(0.5, 1.5)),
    "unigram": MixturePath(UNIGRAM, CosineScheduler()),
    "kinetic": MixturePath(UNIGRAM, KineticOptimalScheduler(UNIGRAM.distribution)),
}
SUMS = {
    "sum-mask": ConvexSumPath.with_uniform_noise(MaskSource(V, V - 1), excluded=(V - 1,)),
    "sum-unigram": ConvexSumPath.with_uniform_noise(UNIGRAM),
}
METRICS = {
    "metric": MetricPath(UniformSource(V), PowerBeta(3.0, 0.9), DISTANCE),
    "metric-unigram": MetricPath(UNIGRAM, PowerBeta(1.0, 2.0), DISTANCE),
}
PATHS = MIXTURES | SUMS | METRICS


def velocities(name: str) -> dict:
    """Every velocity that produces the path, forward ones and mixes."""
    path = PATHS[name]
    found = {"kinetic-optimal": KineticOptimalVelocity(path), "uniform-weight": UniformWeightVelocity(path)}
    if name in MIXTURES:
        forward = ForwardVelocity(path)
        found |= {"forward": forward}
        for noise in ("posterior", "fresh"):
            found[f"corrector-{noise}"] = CorrectorVelocity(path, noise=noise)
            found[f"mix-{noise}"] = 3.5 * forward + -2.5 * BackwardVelocity(path, noise)
        if name != "kinetic":
            found |= {"reversal": ReversalVelocity(path)}
            found |= {"superposition": 0.3 * forward + 0.7 * ReversalVelocity(path)}
    elif name in SUMS:
        found |= {"forward": ConvexVelocity(path)}
        found |= {"mix": 2.0 * ConvexVelocity(path) + -1.0 * ConvexVelocity(path, backward=True)}
    else:
        found |= {"metric": MetricVelocity(path)}
        found |= {"superposition": 0.3 * MetricVelocity(path) + 0.7 * UniformWeightVelocity(path)}
    return found


def backward(name: str) -> dict:
    if name in SUMS:
        return {"backward": ConvexVelocity(PATHS[name], backward=True)}
    return {f"backward-{noise}": BackwardVelocity(PATHS[name], noise) for noise in ("posterior", "fresh")}


FORWARD_CASES = [(name, kind) for name in PATHS for kind in velocities(name)]
BACKWARD_CASES = [(name, kind) for name in MIXTURES | SUMS for kind in backward(name)]


def rate_matrix(velocity, x1: int, t: float) -> torch.Tensor:
    """[V (z), V (x)] at one position given x1."""
    z = torch.arange(V)[:, None]
    return velocity.at(z, torch.full_like(z, x1), times(t).repeat(V))[:, 0]


def flow_given_data(velocity, path, x1: int, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_z u(x, z) p_t(z) and d p_t(x) / dt, both [V]."""
    token = torch.tensor([[x1]])
    produced = path.marginal(token, times(t))[0, 0] @ rate_matrix(velocity, x1, t)
    return produced, path.dmarginal(token, times(t))[0, 0]


@pytest.mark.parametrize(("name", "kind"), FORWARD_CASES + BACKWARD_CASES)
def test_velocity_produces_its_path_given_the_data(name, kind):
    velocity = (velocities(name) | (backward(name) if name not in METRICS else {}))[kind]
    for x1 in range(V - 1):
        for t in (0.1, 0.5, 0.9):
            produced, wanted = flow_given_data(velocity, PATHS[name], x1, t)
            assert torch.allclose(produced, wanted, rtol=0, atol=1e-10)
            rates = rate_matrix(velocity, x1, t)
            assert rates.sum(-1).abs().max() <= 1e-10 * rates.abs().max()


@pytest.mark.parametrize(("name", "kind"), FORWARD_CASES)
def test_forward_rates_are_not_negative(name, kind):
    for x1 in range(V - 1):
        for t in (0.1, 0.5, 0.9):
            check_rates(rate_matrix(velocities(name)[kind], x1, t)[:, None], torch.arange(V)[:, None], tolerance=1e-12)


@pytest.mark.parametrize(("name", "kind"), BACKWARD_CASES)
def test_backward_rates_are_not_positive(name, kind):
    for t in (0.1, 0.5, 0.9):
        rates = rate_matrix(backward(name)[kind], 1, t)
        assert rates.masked_fill(torch.eye(V, dtype=torch.bool), 0).max() < 1e-12
        assert rates.abs().max() > 0.01


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("noise", ["posterior", "fresh"])
def test_equal_parts_of_forward_and_backward_leave_the_distribution(name, noise):
    path = MIXTURES[name]
    still = 2.5 * ForwardVelocity(path) + -2.5 * BackwardVelocity(path, noise)
    produced, _ = flow_given_data(still, path, 1, 0.4)
    assert produced.abs().max() < 1e-10
    assert rate_matrix(still, 1, 0.4).abs().max() > 0.1


def test_a_mix_with_negative_rates_is_rejected():
    path, z = MIXTURES["uniform"], torch.arange(V)[:, None]
    x1, t = torch.zeros_like(z), times(0.4).repeat(V)
    mix = 1.0 * ForwardVelocity(path) + 0.5 * BackwardVelocity(path)
    with pytest.raises(ValueError, match="rates must be at least 0"):
        check_rates(mix.at(z, x1, t), z)
    with pytest.raises(ValueError, match="rates must be finite"):
        check_rates(ForwardVelocity(path).at(z, x1, times(1.0).repeat(V)), z)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("which", ["closed", "summed"])
def test_mean_rates_move_the_distribution_of_whole_texts(name, which):
    toy = Toy(PATHS[name], length=2, tokens=V if PATHS[name].source.mask_id is None else V - 1)
    t = 0.4
    state = toy.everywhere(t)
    p1 = toy.reachable(toy.posterior(state.x, state.t), state)
    if name in SUMS:  # a clean token may still be noise there
        p1 = toy.posterior(state.x, state.t)
    distribution, wanted = toy.marginal(times(t)[0]), toy.dmarginal(times(t)[0])
    for kind, velocity in velocities(name).items():
        if (which == "closed") == (kind in ("kinetic-optimal", "uniform-weight", "metric")):
            continue
        rates = velocity.marginal(state.x, state.t, p1)
        produced = torch.zeros_like(distribution)
        for i in range(2):
            for x in range(V):
                there = state.x.clone()
                there[:, i] = x
                produced.index_add_(0, toy.index(there), distribution * rates[:, i, x])
        assert torch.allclose(produced, wanted, rtol=0, atol=1e-10), kind


@pytest.mark.parametrize("name", METRICS)
def test_metric_closed_form_is_kinetic_optimal(name):
    for x1 in range(V):
        closed, generic = (rate_matrix(u(METRICS[name]), x1, 0.3) for u in (MetricVelocity, KineticOptimalVelocity))
        assert torch.allclose(closed, generic, atol=1e-12)


@pytest.mark.parametrize("name", MIXTURES)
def test_kinetic_optimal_on_a_mixture_is_forward(name):
    z, path = torch.arange(V)[:, None], MIXTURES[name]
    p = path.marginal(torch.tensor([[1]]), times(0.3))[0, 0]
    forward, generic = (rate_matrix(u(path), 1, 0.3) for u in (ForwardVelocity, KineticOptimalVelocity))
    assert torch.allclose(forward[z[:, 0][p > 0]], generic[p > 0], atol=1e-12)


def test_reversal_is_forward_for_the_mask_source_only():
    for name, same in (("mask", True), ("uniform", False)):
        path = MIXTURES[name]
        p = path.marginal(torch.tensor([[1]]), times(0.3))[0, 0]
        forward, reversal = (rate_matrix(u(path), 1, 0.3)[p > 0] for u in (ForwardVelocity, ReversalVelocity))
        assert torch.allclose(forward, reversal) == same


def test_two_terms_of_a_convex_sum_are_the_mixture():
    path = MixturePath(UNIGRAM, PowerScheduler(2.0))
    two = ConvexSumPath(
        UNIGRAM,
        lambda t: torch.stack([t**2, 1 - t**2], -1),
        lambda t: torch.stack([2 * t, -2 * t], -1),
        torch.zeros(0, V, dtype=torch.float64),
    )
    z, t = torch.arange(V)[:, None], times(0.3).repeat(V)
    p1 = dirichlet(V * V, seed=5).reshape(V, 1, V)
    p1 = p1 / p1.sum(-1, keepdim=True)
    for backward_, mixture in ((False, ForwardVelocity(path)), (True, BackwardVelocity(path, "posterior"))):
        assert torch.allclose(ConvexVelocity(two, backward_).marginal(z, t, p1), mixture.marginal(z, t, p1))


def test_corrector_is_pure_prediction_at_the_start():
    path, z = MIXTURES["unigram"], torch.arange(V)[:, None]
    x1, t = torch.zeros_like(z), times(0.0).repeat(V)
    assert torch.equal(CorrectorVelocity(path).at(z, x1, t), ForwardVelocity(path).at(z, x1, t))


def test_fresh_noise_jumps_more_than_posterior_noise():
    path = MIXTURES["uniform"]
    fresh, posterior = (rate_matrix(BackwardVelocity(path, noise), 1, 0.4) for noise in ("fresh", "posterior"))
    assert fresh.abs().sum() > 1.2 * posterior.abs().sum()
