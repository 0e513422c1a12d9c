"""Transitions with a chosen correlation: their pair distributions on toys, by enumeration, and as a proposal of SMC."""

import pytest
import torch

from dfm.draws import BatchDraws, Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource
from dfm.samplers.glass import Glass
from dfm.samplers.kernels import ExactX1, ReMDM
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, run_step, sample
from dfm.sampling.state import FlowState
from tests.dfm.toys import Toy, times, total_variation

V = 2
PATH = MixturePath(MaskSource(V + 1, V), PowerScheduler())
PAIR, TRIPLE = (Toy(PATH, length, tokens=V, seed=2, concentration=0.3) for length in (2, 3))
T, S = 0.4, 0.6
CORRELATIONS = (-0.3, 0.0, 0.4, 0.9, 1.0)


def transition(toy: Toy, sampler, t: float) -> torch.Tensor:
    """[S, S'] of one step from every state, by running every branch of its draws."""
    rows = []
    for row in range(len(toy.states)):
        start = FlowState(**{name: value[row : row + 1] for name, value in vars(toy.everywhere(t)).items()})
        rows.append(toy.enumerate(sampler, start, to_end=False))
    return torch.stack(rows)


def exact_pair(toy: Toy, share: float) -> torch.Tensor:
    """p(x_t, x_s) [S, S'] of the coupling whose correlation is ``share`` of the largest, from its 2 x 2 table."""
    spread = (T * (1 - T) * S * (1 - S)) ** 0.5
    covariance = share * (T * (1 - S) / (S * (1 - T))) ** 0.5 * spread
    both = T * S + covariance  # revealed at both times
    table = torch.tensor([[1 - T - S + both, S - both], [T - both, both]], dtype=torch.float64)
    assert table.min() >= 0
    pair = torch.zeros(len(toy.states), len(toy.states), dtype=torch.float64)
    for x1, weight in zip(toy.states, toy.data, strict=True):
        shown = toy.states != V
        fits = (~shown | (toy.states == x1)).all(-1)
        joint = table[shown.long()[:, None], shown.long()[None]].prod(-1)
        pair += weight * joint * (fits[:, None] & fits[None])
    return pair


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_pairs_are_exact_with_a_round_for_each_token(correlation):
    toy = TRIPLE if correlation == 0.4 else PAIR
    marginal = toy.marginal(times(T)[0])
    errors = []
    for inner_steps in range(1, toy.length + 1):
        step = transition(toy, Glass(PATH, (0.0, T, S, 1.0), correlation, inner_steps), T)
        errors.append(total_variation(marginal[:, None] * step, exact_pair(toy, correlation)))
    assert errors == sorted(errors, reverse=True) and errors[-2] > 1e-3 and errors[-1] < 1e-12
    assert torch.allclose(marginal @ step, toy.marginal(times(S)[0]), atol=1e-12)


@pytest.mark.parametrize("correlation", [-0.3, 0.4, 1.0])
def test_a_run_of_transitions_ends_in_the_data(correlation):
    grid = time_grid(3)
    errors = []
    for inner_steps in (1, 2):
        distribution = PAIR.marginal(times(0.0)[0])
        for t in grid[:-1]:
            distribution = distribution @ transition(PAIR, Glass(PATH, grid, correlation, inner_steps), t)
        errors.append(total_variation(distribution, PAIR.data))
    assert errors[0] > 1e-3 and errors[1] < 1e-12


def test_one_inner_step_is_the_ancestral_sampler_token_for_token():
    x, frozen = torch.zeros(50, 2, dtype=torch.long), torch.zeros(50, 2, dtype=torch.bool)
    glass, ancestral = (
        sample(Posterior(PAIR, PATH.source), sampler, x, frozen, Draws.seeded(*range(50)), keep_trajectory=True)
        for sampler in (Glass(PATH, time_grid(4), 1.0, 1), ExactX1(PATH, time_grid(4)))
    )
    for (t, tokens), (t_other, others) in zip(glass.trajectory, ancestral.trajectory, strict=True):
        assert torch.equal(t, t_other) and torch.equal(tokens, others)
    assert torch.equal(glass.evaluations, ancestral.evaluations)


def test_one_inner_step_with_masking_again_is_remdm():
    glass = Glass(PATH, (0.0, T, S, 1.0), 0.7, 1)
    eta = 0.3 * (1 - S) / min(1, (1 - S) / T)
    remdm = ReMDM(PATH, (0.0, T, S, 1.0), "rescale", eta)
    state = PAIR.everywhere(T)
    p1 = PAIR.reachable(PAIR.posterior(state.x, state.t), state)
    wanted = PAIR.transition(remdm.distribution(state, p1, times(S).repeat(len(state.x))))
    assert torch.allclose(transition(PAIR, glass, T), wanted, atol=1e-12)


def test_a_correlation_without_a_pair_is_cut():
    glass = Glass(PATH, (0.0, 0.9, 0.95, 1.0), -1.0)
    reveal, sigma = glass.probabilities(times(0.9, 0.05), times(0.95, 0.1))
    assert torch.allclose(sigma, times(0.05 / 0.9, 1.0)) and torch.allclose(reveal, times(1.0, 0.1 / 0.95))


def test_by_name_steps_are_evaluations():
    for steps, transitions, inner in ((1, 1, 1), (3, 1, 3), (6, 1, 4), (32, 8, 4)):
        glass = Glass.default(PATH, time_grid(steps))
        assert (len(glass.grid) - 1, glass.inner_steps) == (transitions, inner)


def tilted(correlation: float, weighted: bool) -> float:
    """Total variation of particles to the data tilted by exp(2 * number of zeros), resampled after every transition."""
    count, reward = 20_000, 2.0
    sampler, draws = Glass(PATH, time_grid(4), correlation, 2), BatchDraws(torch.Generator().manual_seed(0))
    nothing = torch.zeros(count, 2, dtype=torch.long)
    state = FlowState.start(nothing, nothing.bool(), PATH.source, draws)
    posterior, generator = Posterior(PAIR, PATH.source), torch.Generator().manual_seed(1)
    told = torch.zeros(count, dtype=torch.float64)
    while not state.done.all():
        run_step(sampler.step(state, draws), lambda query, state=state: posterior.answer(query, state))
        rewards = reward * ((state.x == 0) & ~state.masked).sum(-1).double()
        weights = (rewards - told).exp() if weighted else torch.ones(count, dtype=torch.float64)
        rows = torch.multinomial(weights, count, replacement=True, generator=generator)
        state, told = state.at(rows.tolist()), rewards[rows]
    found = torch.bincount(PAIR.index(state.x), minlength=len(PAIR.states)).double() / count
    wanted = PAIR.data * (reward * (PAIR.states == 0).sum(-1)).exp()
    return total_variation(found, wanted / wanted.sum())


@pytest.mark.parametrize("correlation", [0.4, 1.0])
def test_a_proposal_of_smc_leaves_the_tilted_distribution(correlation):
    assert tilted(correlation, weighted=True) < 0.03
    assert tilted(correlation, weighted=False) > 0.06


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="correlation must be"):
        Glass(PATH, time_grid(2), 1.5)
    with pytest.raises(ValueError, match="inner_steps must be"):
        Glass(PATH, time_grid(2), 0.5, 0)
    with pytest.raises(ValueError, match="source must have a mask token here"):
        Glass(MixturePath(UniformSource(3), PowerScheduler()), time_grid(2))
