"""Whole runs of samplers against each other: exact where all branches can be run, else sampled with fixed seeds."""

import itertools

import pytest
import torch

from decoding.rules import ConfidenceThreshold, EntropyBound, RowScores
from dfm.draws import Draws
from dfm.paths.beta_schedules import PowerBeta
from dfm.paths.metric import EmbeddingDistance, MetricPath
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource
from dfm.rates.conditional import MetricVelocity
from dfm.rates.velocities import CorrectorVelocity, ForwardVelocity
from dfm.samplers.events import FirstHitting, Uniformisation
from dfm.samplers.kernels import D3PM, ExactX1, Psi, ReMDM
from dfm.samplers.metric import MetricX1
from dfm.samplers.ranked import RuleSampler, ScheduledTopK
from dfm.samplers.rates import EulerX1, ThetaTrapezoidal
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, sample
from dfm.sampling.state import FlowState
from tests.dfm.toys import Toy, dirichlet, entropy, times, total_variation

V = 2
MASK = MixturePath(MaskSource(V + 1, V), PowerScheduler())
UNIFORM = MixturePath(UniformSource(3), PowerScheduler())
METRIC = MetricPath(UniformSource(3), PowerBeta(1.0, 2.0), EmbeddingDistance(torch.eye(3, 2, dtype=torch.float64)))


class WrongToy(Toy):
    """Its network is an arbitrary table, which is the posterior of no data distribution: orders of decoding now differ."""

    def __init__(self, path, length: int, tokens: int):
        super().__init__(path, length, tokens)
        self.table = torch.zeros(len(self.states), length, self.vocab_size, dtype=torch.float64)
        for row in range(len(self.states)):
            for i in range(length):
                self.table[row, i, :tokens] = dirichlet(tokens, seed=row * length + i)

    def posterior(self, x, t):
        return self.table[self.index(x)]


def fresh(path, length: int) -> FlowState:
    nothing = torch.zeros(1, length, dtype=torch.bool)
    return FlowState.start(torch.zeros(1, length, dtype=torch.long), nothing, path.source, Draws.seeded(0))


def random_order(toy: Toy) -> torch.Tensor:
    """The distribution of revealing one token at a time in uniformly random order."""
    distribution = torch.zeros(len(toy.states), dtype=torch.float64)
    orders = list(itertools.permutations(range(toy.length)))
    for order in orders:
        for row, text in enumerate(toy.states):
            probability, x = 1.0, torch.full((1, toy.length), V)
            for i in order:
                probability *= toy.posterior(x, times(0.5))[0, i, text[i]].item()
                x[0, i] = text[i]
            distribution[row] += probability / len(orders)
    return distribution


@pytest.mark.parametrize("make", [Toy, WrongToy])
def test_first_hitting_random_order_and_fine_ancestral_give_one_distribution(make):
    toy = make(MASK, length=3, tokens=V)
    expected = random_order(toy)
    if make is Toy:
        assert torch.allclose(expected, toy.data, atol=1e-12)
    assert torch.allclose(toy.enumerate(FirstHitting(MASK), fresh(MASK, 3)), expected, atol=1e-12)
    error = [total_variation(toy.run(ExactX1(MASK, time_grid(n))), expected) for n in (16, 32)]
    assert error[1] < 0.03 and 1.8 < error[0] / error[1] < 2.2


def test_left_to_right_is_another_distribution_for_a_wrong_network():
    """So the test above can fail: with such a network the order matters."""
    toy = WrongToy(MASK, length=3, tokens=V)
    distribution = torch.ones(len(toy.states), dtype=torch.float64)
    for row, text in enumerate(toy.states):
        x = torch.full((1, 3), V)
        for i in range(3):
            distribution[row] *= toy.table[toy.index(x)[0], i, text[i]]
            x[0, i] = text[i]
    assert total_variation(distribution, random_order(toy)) > 0.02


def sampled(toy: Toy, sampler, count: int) -> torch.Tensor:
    """The share [S] of each text among ``count`` samples."""
    x, frozen = torch.zeros(count, toy.length, dtype=torch.long), torch.zeros(count, toy.length, dtype=torch.bool)
    draws = Draws([torch.Generator().manual_seed(0)] * count)
    out = sample(Posterior(toy, toy.path.source), sampler, x, frozen, draws)
    return torch.bincount(toy.index(out.tokens), minlength=len(toy.states)) / count


def noise(distribution: torch.Tensor, count: int) -> float:
    """Three standard errors above the mean of the total variation between a distribution and its sample."""
    deviation = (distribution * (1 - distribution) / count).sqrt()
    return (0.5 * 0.8 * deviation.sum() + 3 * 0.5 * 0.6 * deviation.norm()).item()


def test_first_hitting_as_sampled():
    toy, count = WrongToy(MASK, length=2, tokens=V), 2000
    distribution = random_order(toy)
    assert total_variation(sampled(toy, FirstHitting(MASK), count), distribution) < noise(distribution, count)


def test_first_hitting_times_are_those_of_the_scheduler():
    count, length = 2000, 3
    x, frozen = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, length, dtype=torch.bool)
    path = MixturePath(MASK.source, PowerScheduler(2.0))
    draws = Draws([torch.Generator().manual_seed(0)] * count)
    out = sample(Posterior(Toy(path, 3, V), path.source), FirstHitting(path), x, frozen, draws, keep_trajectory=True)
    moments = torch.stack([t for t, _ in out.trajectory[1:]])
    shown = (moments[None] <= times(0.3, 0.6, 0.9)[:, None, None]).double().mean((1, 2))
    assert torch.allclose(shown, times(0.09, 0.36, 0.81), atol=0.025)


def test_uniformisation_matches_fine_exact_x1_and_the_data():
    toy, count, rest = Toy(UNIFORM, length=2, tokens=3, concentration=0.4), 2000, 0.02
    fine = toy.run(ExactX1(UNIFORM, (*(i * (1 - rest) / 200 for i in range(201)), 1.0)))
    assert total_variation(fine, toy.data) < 0.01
    assert total_variation(sampled(toy, Uniformisation(UNIFORM, rest), count), fine) < noise(fine, count)


def test_uniformisation_takes_about_length_times_log_rest_evaluations():
    x, frozen = torch.zeros(300, 2, dtype=torch.long), torch.zeros(300, 2, dtype=torch.bool)
    toy, draws = Toy(UNIFORM, 2, 3), Draws([torch.Generator().manual_seed(0)] * 300)
    out = sample(Posterior(toy, UNIFORM.source), Uniformisation(UNIFORM, 0.02), x, frozen, draws)
    assert abs(out.evaluations.double().mean() - (2 * -times(0.02).log() + 1)) < 0.5


@pytest.mark.parametrize(
    "sampler",
    [
        ExactX1(UNIFORM, (0.0, 0.4, 0.9)),
        D3PM(UNIFORM, (0.0, 0.4, 0.9)),
        Psi(UNIFORM, (0.0, 0.4, 0.9)),
        EulerX1(UNIFORM, (0.0, 0.4, 0.9), ForwardVelocity(UNIFORM)),
        EulerX1(METRIC, (0.0, 0.4, 0.9), MetricVelocity(METRIC)),
        MetricX1(METRIC, (0.0, 0.4, 0.9)),
        ReMDM(MASK, (0.0, 0.4, 0.9), eta=0.1),
        ThetaTrapezoidal(UNIFORM, (0.0, 0.4, 0.9), ForwardVelocity(UNIFORM)),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_step_draws_from_its_distribution(sampler):
    toy = Toy(sampler.path, length=1, tokens=V if sampler.path.source.mask_id is not None else 3)
    if isinstance(sampler, ThetaTrapezoidal):
        expected, tolerance = toy.marginal(times(0.9)[0]), 0.03  # of second order: even a long step comes near
    else:
        expected, tolerance = toy.push(toy.marginal(times(0.4)[0]), sampler, 0.4, 0.9), 1e-12
    distribution = torch.zeros_like(expected)
    for row, probability in enumerate(toy.marginal(times(0.4)[0])):
        start = FlowState(**{name: value[row : row + 1] for name, value in vars(toy.everywhere(0.4)).items()})
        distribution += probability * toy.enumerate(sampler, start, to_end=False)
    assert total_variation(distribution, expected) < tolerance


def test_theta_trapezoidal_keeps_what_the_first_half_revealed():
    toy = Toy(MASK, length=2, tokens=V)
    sampler = ThetaTrapezoidal(MASK, time_grid(2), CorrectorVelocity(MASK))
    state = toy.everywhere(0.3)
    p1 = toy.reachable(toy.posterior(state.x, state.t), state)
    rates = sampler.rates(state, state.t, p1)
    distribution = sampler.second_distribution(state, 0 * rates, rates, state.t + 0.2)
    kept = distribution.gather(-1, state.x[..., None])[..., 0]
    assert (kept[~state.masked] == 1).all() and (kept[state.masked] < 1).all()
    assert (rates.sum(-1)[~state.masked] > 0).any()  # the corrector would have taken some back


def test_revealing_one_token_at_a_time_is_exact_whatever_the_order():
    toy = Toy(MASK, length=3, tokens=V)
    for rule in (EntropyBound(0.0), ConfidenceThreshold(1.0)):
        assert torch.allclose(toy.enumerate(RuleSampler(MASK.source, rule), fresh(MASK, 3)), toy.data, atol=1e-12)
    one_each = ScheduledTopK(MASK, (0.0, 1 / 3 + 1e-9, 2 / 3 + 1e-9, 1.0), "margin")
    assert torch.allclose(toy.enumerate(one_each, fresh(MASK, 3)), toy.data, atol=1e-12)
    at_once = toy.enumerate(RuleSampler(MASK.source, EntropyBound(float("inf"))), fresh(MASK, 3))
    assert total_variation(at_once, toy.data) > 0.05


@pytest.mark.parametrize("seed", range(20))
def test_entropy_bound_bounds_the_dependence(seed):
    """KL(joint || product) = sum H - H_joint <= sum H - max H, so what EntropyBound reveals costs at most its bound."""
    length, tokens = 3, 2 + seed % 3
    joint = dirichlet(tokens**length, seed, concentration=0.2).reshape([tokens] * length)
    single = [joint.sum([d for d in range(length) if d != i]) for i in range(length)]
    h = [entropy(distribution) for distribution in single]
    assert sum(h) - entropy(joint) <= sum(h) - max(h) + 1e-12
    logits = torch.stack(single).log()[None]
    for bound in (0.0, 0.1, 0.5, 1.0, 10.0):
        revealed = EntropyBound(bound)(RowScores.of(logits), torch.ones(1, length, dtype=torch.bool))[0]
        chosen = [i for i in range(length) if revealed[i]]
        hidden = [i for i in range(length) if not revealed[i]]
        spent = sum(h[i] for i in chosen) - entropy(joint.sum(hidden) if hidden else joint)
        assert spent <= bound + 1e-6
        assert len(chosen) == 1 or bound > 0
