"""Samplers whose step is a distribution per position: exact transitions of toys, enumerated, against the
distributions of the path.
"""

import itertools

import pytest
import torch

from dfm.draws import Draws
from dfm.paths.beta_schedules import PowerBeta
from dfm.paths.metric import EmbeddingDistance, MetricPath
from dfm.paths.mixture import ConvexSumPath, MixturePath
from dfm.paths.schedulers import CosineScheduler, KineticOptimalScheduler, PowerScheduler
from dfm.paths.sources import MaskSource, UniformSource, UnigramSource
from dfm.rates.conditional import KineticOptimalVelocity, MetricVelocity, ReversalVelocity
from dfm.rates.kernels import Routes, remask_kernel, reversal_kernel
from dfm.rates.velocities import ConvexVelocity, CorrectorSchedule, CorrectorVelocity, ForwardVelocity
from dfm.samplers.kernels import D3PM, Corrector, ExactX1, FrozenPass, Psi, ReMDM
from dfm.samplers.metric import MetricX1
from dfm.samplers.ranked import LooGibbs
from dfm.samplers.rates import Euler, EulerX1, TauLeap, ThetaTrapezoidal
from dfm.sampling.distributions import leap_distribution
from dfm.sampling.grid import time_grid
from dfm.sampling.state import FlowState
from tests.dfm.toys import Toy, dirichlet, times, total_variation

V = 3
END = 0.9
DISTANCE = EmbeddingDistance(torch.randn(V, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
MASK = MixturePath(MaskSource(V + 1, V), CosineScheduler())
UNIFORM = MixturePath(UniformSource(V), CosineScheduler())
UNIGRAM = MixturePath(UnigramSource(dirichlet(V, seed=3)), CosineScheduler())
SUM = ConvexSumPath.with_uniform_noise(UnigramSource(dirichlet(V, seed=3)))
METRIC = MetricPath(UniformSource(V), PowerBeta(1.0, 2.0), DISTANCE)
KINETIC = MixturePath(
    UNIGRAM.source, KineticOptimalScheduler(UNIGRAM.source.distribution)
)  # each token has its own kappa
MIXTURES = {"mask": MASK, "uniform": UNIFORM, "unigram": UNIGRAM, "kinetic": KINETIC}
GENTLE = CorrectorSchedule(1.0, 0.5, 0.5)

ONE_STEP = {
    "exact_x1": lambda path, grid: ExactX1(path, grid),
    "d3pm": lambda path, grid: D3PM(path, grid),
    "psi": lambda path, grid: Psi(path, grid, keep=1 - 0.5 / len(grid)),
    "corrector": lambda path, grid: Corrector(path, grid, GENTLE),
}
RATES = {
    "euler": lambda path, grid: Euler(path, grid, ForwardVelocity(path)),
    "euler-corrector": lambda path, grid: Euler(path, grid, CorrectorVelocity(path, GENTLE)),
    "euler_x1": lambda path, grid: EulerX1(path, grid, ForwardVelocity(path)),
    "euler_x1-kinetic": lambda path, grid: EulerX1(path, grid, KineticOptimalVelocity(path)),
    "tau_leap-reject": lambda path, grid: TauLeap(path, grid, ForwardVelocity(path)),
    "tau_leap-first": lambda path, grid: TauLeap(path, grid, ForwardVelocity(path), "first"),
}
CASES = [(kind, name) for kind in ONE_STEP | RATES for name in MIXTURES]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ONE_STEP for name in MIXTURES])
@pytest.mark.parametrize("steps", [1, 3])
def test_kernels_are_exact_for_one_position(kind, name, steps):
    toy = Toy(MIXTURES[name], length=1, tokens=V)
    distribution = toy.run(ONE_STEP[kind](toy.path, time_grid(steps, END)))
    assert torch.allclose(distribution, toy.marginal(times(END)[0]), atol=1e-10)


@pytest.mark.filterwarnings("ignore:Euler")
@pytest.mark.parametrize("kind", RATES)
def test_rates_held_for_a_step_are_not(kind):
    toy = Toy(UNIFORM, length=1, tokens=V)
    distribution = toy.run(RATES[kind](toy.path, time_grid(3, END)))
    assert total_variation(distribution, toy.marginal(times(END)[0])) > 1e-3


def errors(toy: Toy, make, steps=(32, 64)) -> list[float]:
    wanted = toy.marginal(times(END)[0])
    return [total_variation(toy.run(make(toy.path, time_grid(n, END))), wanted) for n in steps]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_short_steps_give_the_distribution_of_the_path(kind, name):
    coarse, fine = errors(Toy(MIXTURES[name], length=2, tokens=V, concentration=0.4), (ONE_STEP | RATES)[kind])
    assert fine < 0.04 and 1.7 < coarse / fine < 2.5


@pytest.mark.parametrize("rule", ["exp", "matched"])
def test_metric_rules_converge(rule):
    coarse, fine = errors(Toy(METRIC, 2, V, concentration=0.4), lambda path, grid: MetricX1(path, grid, rule))
    assert fine < 0.02 and 1.7 < coarse / fine < 2.5


def test_metric_moment_does_not_converge():
    toy = Toy(METRIC, 2, V, concentration=0.4)
    coarse, fine = errors(toy, lambda path, grid: MetricX1(path, grid, "moment"))
    assert fine > 0.05 and fine > 0.8 * coarse


def test_rates_of_other_paths_converge():
    metric = Toy(METRIC, 2, V, concentration=0.4)
    coarse, fine = errors(metric, lambda path, grid: EulerX1(path, grid, MetricVelocity(path)))
    assert fine < 0.02 and 1.7 < coarse / fine < 2.5
    mixed = Toy(SUM, 2, V, concentration=0.4)
    coarse, fine = errors(mixed, lambda path, grid: Euler(path, grid, ConvexVelocity(path)))
    assert fine < 0.02 and 1.7 < coarse / fine < 2.5


def test_d3pm_is_the_finite_step_of_the_reversal():
    state, path = Toy(UNIFORM, 2, V).everywhere(0.4), UNIFORM
    p1, h = Toy(UNIFORM, 2, V).posterior(state.x, state.t), 1e-6
    later = state.t + h
    step = D3PM(path, time_grid(1)).distribution(state, p1, later)
    stay = torch.nn.functional.one_hot(state.x, V).double()
    rates = ReversalVelocity(path).marginal(state.x, state.t, p1)
    assert torch.allclose((step - stay) / h, rates, atol=1e-4)


def test_a_grid_may_start_where_rates_are_finite():
    toy = Toy(UNIFORM, 1, V)
    with pytest.raises(ValueError, match="rates must be finite"):
        toy.run(Euler(UNIFORM, time_grid(4), ReversalVelocity(UNIFORM)))
    grid = (0.02, *(0.02 + 0.88 * (i + 1) / 200 for i in range(200)))
    distribution = toy.run(Euler(UNIFORM, grid, ReversalVelocity(UNIFORM)))
    assert total_variation(distribution, toy.marginal(times(0.9)[0])) < 0.01


@pytest.mark.filterwarnings("ignore:Euler")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_last_step_takes_the_data(kind, name):
    toy = Toy(MIXTURES[name], length=2, tokens=V)
    distribution = toy.run((ONE_STEP | RATES)[kind](toy.path, time_grid(3)))
    assert distribution[toy.data == 0].sum() < 1e-12 and abs(distribution.sum() - 1) < 1e-10


def test_euler_warns_and_stays_a_distribution_when_steps_are_too_long():
    toy = Toy(UNIFORM, length=1, tokens=V)
    with pytest.warns(UserWarning, match="jump probabilities sum to [1-9.]+ and are scaled to 1; use more steps"):
        distribution = toy.run(Euler(UNIFORM, time_grid(3, END), CorrectorVelocity(UNIFORM, CorrectorSchedule(2.0))))
    assert distribution.min() >= 0 and abs(distribution.sum() - 1) < 1e-12


def remdm(path, steps: int, variant: str, eta: float) -> ReMDM:
    return ReMDM(path, time_grid(steps, 0.6), variant, eta)


@pytest.mark.parametrize(
    ("variant", "eta"), [("cap", 0.008), ("cap", 0.3), ("cap", 1.0), ("rescale", 0.5), ("rescale", 1)]
)
def test_remdm_reveals_the_scheduled_share_for_any_sigma(variant, eta):
    toy = Toy(MASK, length=2, tokens=V)
    distribution = toy.run(remdm(MASK, 5, variant, eta))
    shown = (toy.states != V).double().mean(-1)
    assert abs(distribution @ shown - MASK.scheduler.kappa(times(0.6)[0])) < 1e-10


def test_remdm_is_exact_in_the_limit_of_small_sigma():
    toy = Toy(MASK, length=2, tokens=V, concentration=0.4)
    error = [
        total_variation(toy.run(remdm(MASK, n, "cap", 2 / n)), toy.marginal(times(0.6)[0])) for n in (32, 64)
    ]  # fmt: skip
    assert error[1] < 0.02 and 1.7 < error[0] / error[1] < 2.5


def test_remdm_with_confidence_remasks_the_doubtful():
    state = Toy(MASK, length=2, tokens=V).everywhere(0.5)
    state.confidence = torch.tensor([0.9, 0.1], dtype=torch.float64).expand_as(state.confidence)
    k, k_next = (MASK.scheduler.kappa(times(t))[:, None, None] for t in (0.5, 0.6))
    sigma = ReMDM(MASK, time_grid(4), "confidence", 1.0).sigma(state, k, k_next)[..., 0]
    both = ~state.masked.any(-1)
    assert torch.allclose(sigma.sum(-1)[both], ((1 - k_next) / k).clamp_max(1)[0, 0])
    assert torch.allclose((sigma[:, 1] / sigma[:, 0])[both].log(), times(0.8))
    assert (sigma[state.masked] == 0).all()


def test_remdm_acts_in_its_window_only():
    state = Toy(MASK, length=2, tokens=V).everywhere(0.4)
    loop = ReMDM.loop(MaskSource(V + 1, V), steps=20)
    k = torch.full((1, 1, 1), 0.9, dtype=torch.float64)
    assert (loop.sigma(state, k, k) == 0).all()
    state.t[:] = 0.5
    assert torch.allclose(loop.sigma(state, k, k), torch.tensor(0.02, dtype=torch.float64))
    held = loop.path.scheduler.kappa(times(0.44, 0.45, 0.7, 0.95, 1.0))
    assert torch.allclose(held, times(0.88, 0.9, 0.9, 0.9, 1.0))


def test_psi_keeps_the_distribution_for_any_keep_and_contains_remdm_and_d3pm():
    for name in MIXTURES:
        toy = Toy(MIXTURES[name], length=1, tokens=V)
        for keep in (0.0, 0.3, 1.0):
            distribution = toy.run(Psi(toy.path, time_grid(3, END), keep))
            assert torch.allclose(distribution, toy.marginal(times(END)[0]), atol=1e-10)
    toy = Toy(MASK, length=2, tokens=V)
    k, k_next = MASK.scheduler.kappa(times(0.5, 0.7))
    for sigma in (0.1, 1 - k_next.item()):
        keep = 1 - sigma / (1 - k_next.item())
        state = toy.everywhere(0.5)
        p1, source = toy.reachable(toy.posterior(state.x, state.t), state), MASK.source.probabilities(k)
        psi = Psi(MASK, time_grid(1), keep).distribution(state, p1, state.t + 0.2)
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        remask = remask_kernel(k * one, k_next * one, sigma * one).distribution(state.x, p1, source)
        assert torch.allclose(psi, remask, atol=1e-12)
    state = Toy(UNIGRAM, length=2, tokens=V).everywhere(0.5)
    p1 = Toy(UNIGRAM, length=2, tokens=V).posterior(state.x, state.t)
    psi, d3pm = Psi(UNIGRAM, time_grid(1), 1.0), D3PM(UNIGRAM, time_grid(1))
    assert torch.equal(psi.distribution(state, p1, state.t + 0.2), d3pm.distribution(state, p1, state.t + 0.2))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_frozen_pass_leaves_the_distribution_of_one_position(name):
    toy = Toy(MIXTURES[name], length=1, tokens=V)
    for strength in (0.2, 1.0):
        state = toy.everywhere(0.5)
        p1 = toy.reachable(toy.posterior(state.x, state.t), state)
        step = toy.transition(FrozenPass(toy.path, strength).distribution(state, p1))
        distribution = toy.marginal(times(0.5)[0])
        assert torch.allclose(distribution @ step, distribution, atol=1e-12)
        assert (step.diagonal() < 0.95).any()


def passes_from_each_state(toy: Toy, sampler, t: float) -> torch.Tensor:
    """[S, S'] of one pass, by running every branch from every state."""
    rows = []
    for row in range(len(toy.states)):
        start = FlowState(**{name: value[row : row + 1] for name, value in vars(toy.everywhere(t)).items()})
        rows.append(toy.enumerate(sampler, start, to_end=False))
    return torch.stack(rows)


@pytest.mark.parametrize("path", [UNIFORM, UNIGRAM], ids=["uniform", "unigram"])
def test_one_random_site_of_leave_one_out_gibbs_leaves_the_distribution(path):
    toy = Toy(path, length=2, tokens=V, concentration=0.3)
    distribution = toy.marginal(times(0.6)[0])
    assert total_variation(distribution @ passes_from_each_state(toy, LooGibbs(path), 0.6), distribution) < 1e-12
    for heuristic, error in ((LooGibbs(path, sites=2), 0.01), (LooGibbs(path, choose="least_confident"), 0.05)):
        assert total_variation(distribution @ passes_from_each_state(toy, heuristic, 0.6), distribution) > error


@pytest.mark.parametrize("path", [UNIFORM, UNIGRAM], ids=["uniform", "unigram"])
def test_leave_one_out_gibbs_forgets_the_token_it_replaces(path):
    """Unlike x1 ~ p_1t with noise put on it again, which leaves p_t too but keeps a memory of the old token."""
    toy = Toy(path, length=1, tokens=V)
    distribution = toy.marginal(times(0.6)[0])
    assert torch.allclose(passes_from_each_state(toy, LooGibbs(path), 0.6), distribution.expand(V, V), atol=1e-12)


def theta_error(steps: int, positive_part: bool) -> float:
    """Exact total variation of the theta-trapezoidal method on one uniform position, linear kappa, to t = 0.9."""
    path = MixturePath(UniformSource(5), PowerScheduler())
    toy = Toy(path, length=1, tokens=5)
    grid = time_grid(steps, 0.9)
    sampler = ThetaTrapezoidal(path, grid, ForwardVelocity(path))
    distribution = toy.marginal(times(0.0)[0])
    for t, s in itertools.pairwise(grid):
        start, mid = toy.everywhere(t), toy.everywhere(t)
        p1 = toy.posterior(start.x, start.t)
        first = toy.transition(sampler.distribution(start, p1, times(s).repeat(5)))
        start_rates = sampler.rates(start, start.t, p1)
        t_mid = start.t + (s - t) / 2
        mid_rates = sampler.rates(mid, t_mid, toy.posterior(mid.x, t_mid))
        after = torch.zeros_like(distribution)
        for z in range(5):
            held = start_rates[z].expand(5, 1, 5)
            if positive_part:
                second = sampler.second_distribution(mid, held, mid_rates, times(s).repeat(5))
            else:
                rates = (2 * mid_rates - held).scatter(-1, mid.x[..., None], 0)
                second = leap_distribution(mid.x, rates, times((s - t) / 2).repeat(5), "first")
            after += distribution[z] * first[z] @ toy.transition(second)
        distribution = after
    return total_variation(distribution, toy.marginal(times(0.9)[0]))


def test_theta_trapezoidal_numbers():
    for steps, expected in ((4, 5.2e-3), (8, 1.6e-3), (16, 5.3e-4), (32, 2.1e-4)):
        assert theta_error(steps, positive_part=True) == pytest.approx(expected, rel=0.05)
    assert theta_error(32, positive_part=False) == pytest.approx(1.1e-4, rel=0.05)
    assert theta_error(16, positive_part=False) / theta_error(32, positive_part=False) > 3.8


def test_tau_leap_numbers_on_the_same_toy():
    path = MixturePath(UniformSource(5), PowerScheduler())
    toy = Toy(path, length=1, tokens=5)
    for steps, expected in ((4, 3.8e-2), (8, 2.0e-2), (16, 9.9e-3), (32, 4.9e-3)):
        leap = TauLeap(path, time_grid(steps, 0.9), ForwardVelocity(path), "first")
        assert total_variation(toy.run(leap), toy.marginal(times(0.9)[0])) == pytest.approx(expected, rel=0.02)
    # On a linear kappa Euler's step is the exact kernel.
    euler = toy.run(Euler(path, time_grid(4, 0.9), ForwardVelocity(path)))
    assert total_variation(euler, toy.marginal(times(0.9)[0])) < 1e-12


def test_leap_distribution_counts_poisson_jumps():
    rates, h = times(0.0, 0.7, 1.9), 0.4
    none = torch.distributions.Poisson(h * rates).log_prob(torch.zeros(3)).exp()
    one = torch.distributions.Poisson(h * rates[1:]).log_prob(torch.ones(2)).exp()
    alone = one * none.prod() / none[1:]  # one jump to this token and none to any other
    rejecting, keeping = (
        leap_distribution(torch.tensor([[0]]), rates[None, None], times(h), s) for s in ("reject", "first")
    )
    assert torch.allclose(rejecting[0, 0, 1:], alone)
    assert torch.allclose(keeping[0, 0, 1:], (1 - none.prod()) * rates[1:] / rates.sum())
    assert torch.allclose(torch.stack([rejecting.sum(), keeping.sum()]), times(1.0, 1.0))


def test_routes_weigh_noise_by_the_data_token():
    """Where the noise route depends on x1, its mean under the posterior counts."""
    p1 = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64)
    routes = Routes(torch.zeros(1, 1, 2).double(), torch.tensor([[[1.0, 0.0]]]).double())
    distribution = routes.distribution(torch.tensor([[0]]), p1, times(0.0, 1.0))
    assert torch.allclose(distribution[0, 0], times(0.75, 0.25))
    z = torch.tensor([[0]])
    half = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    assert reversal_kernel(half / 2, half, z, times(0.5, 0.5)).noise.shape == (1, 1, 2)


@pytest.mark.parametrize("path", [MASK, UNIFORM, UNIGRAM], ids=["mask", "uniform", "unigram"])
@pytest.mark.parametrize("name", ["exact", "euler", "euler_x1"])
def test_asking_for_those_that_jump_alone_has_the_distribution_of_the_step(name, path):
    """The shortcut draws who jumps before where to; its distribution is that of ``distribution`` from every state,
    also at the end.
    """
    toy = Toy(path, length=2, tokens=V, concentration=0.5)
    grid = (0.3, 0.6, 1.0)
    velocity = ForwardVelocity(path)
    sampler = {"exact": ExactX1(path, grid), "euler": Euler(path, grid, velocity)}.get(
        name, EulerX1(path, grid, velocity)
    )
    assert next(sampler.step(toy.everywhere(0.3), Draws.seeded(*range(len(toy.states))))).only is not None
    for t, s in ((0.3, 0.6), (0.6, 1.0)):
        steps, every = passes_from_each_state(toy, sampler, t), torch.eye(len(toy.states), dtype=torch.float64)
        assert torch.allclose(steps, torch.stack([toy.push(start, sampler, t, s) for start in every]), atol=1e-12)
        assert (steps.max(-1).values < 0.99).any()


def test_no_shortcut_where_kappa_differs_between_tokens():
    distribution = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    path = MixturePath(UnigramSource(distribution), KineticOptimalScheduler(distribution))
    grid, velocity = (0.0, 0.5, 1.0), ForwardVelocity(path)
    for sampler in (ExactX1(path, grid), Euler(path, grid, velocity), EulerX1(path, grid, velocity)):
        assert sampler.jump_probability(Toy(path, 1, 3).everywhere(0.2), times(0.5)) is None
