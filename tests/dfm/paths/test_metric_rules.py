"""Jump rules of metric paths map the distributions of their path onto each other nearly, or not."""

import torch

from dfm.paths.beta_schedules import PowerBeta
from dfm.paths.metric import EmbeddingDistance, MetricPath
from dfm.paths.metric_rules import METRIC_RULES, JumpTable
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import UniformSource
from dfm.samplers.metric import metric_distribution
from tests.dfm.toys import dirichlet, times, total_variation

METRIC = MetricPath(
    UniformSource(7),
    PowerBeta(3.0, 0.9),
    EmbeddingDistance(torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))),
)


def metric_error(rule: str, t: float, s: float, x1: int = 2) -> float:
    """Distance to p_s of p_t after one step, given x1."""
    z = torch.arange(7)[:, None]
    distribution = metric_distribution(METRIC, rule, z, torch.full_like(z, x1), times(t).repeat(7), times(s).repeat(7))[
        :, 0
    ]
    assert distribution.min() >= 0 and torch.allclose(distribution.sum(-1), torch.ones((), dtype=torch.float64))
    here, there = (METRIC.marginal(torch.tensor([[x1]]), times(time))[0, 0] for time in (t, s))
    return total_variation(here @ distribution, there)


def test_exp_is_right_to_second_order_in_the_step():
    errors = [metric_error("exp", 0.3, 0.3 + h) for h in (0.04, 0.02, 0.01)]
    assert errors[0] > 1e-6
    assert all(3.5 < a / b < 4.5 for a, b in zip(errors, errors[1:], strict=False))


def test_matched_keeps_the_mean_distance_and_beats_exp():
    z, x1 = torch.arange(7)[:, None], torch.full((7, 1), 2)
    distribution = metric_distribution(METRIC, "matched", z, x1, times(0.3).repeat(7), times(0.35).repeat(7))[:, 0]
    here, there = (METRIC.marginal(torch.tensor([[2]]), times(time))[0, 0] for time in (0.3, 0.35))
    distances = METRIC.distance(torch.tensor(2))
    assert torch.allclose((here @ distribution) @ distances, there @ distances, atol=1e-9)
    assert metric_error("matched", 0.3, 0.35) < metric_error("exp", 0.3, 0.35)


def test_moment_does_not_keep_the_distribution_in_any_step():
    still = METRIC.marginal(torch.tensor([[2]]), times(0.3))[0, 0]
    for h in (0.05, 0.001):
        nothing = total_variation(still, METRIC.marginal(torch.tensor([[2]]), times(0.3 + h))[0, 0])
        assert metric_error("moment", 0.3, 0.3 + h) > max(0.05, nothing)  # worse than not to move at all


def test_moment_on_a_mixture_jumps_with_k_next():
    """With all other tokens at one distance the distribution is that of a mixture, where (k' - k) / (1 - k) would be right."""
    size, k, k_next = 4, times(0.3), times(0.8)
    path = MixturePath(UniformSource(size), PowerScheduler())
    distances = 1 - torch.eye(size, dtype=torch.float64)[:1][None]
    p, p_next = (path.marginal(torch.tensor([[0]]), t) for t in (k, k_next))
    jump = METRIC_RULES["moment"](distances, p, p_next, k)[0, 0, 1]
    assert torch.allclose(jump, 1 - (1 - k_next) * (1 - 1 / size))


def test_jump_table_equals_sums_over_pairs():
    distances, p = dirichlet(6)[None, None], dirichlet(6, seed=1)[None, None]
    distances[..., 4] = distances[..., 1]  # a tie
    table = JumpTable.of(distances, p)
    d, mass = distances[0, 0], p[0, 0]
    rates = mass * (d[:, None] - d).clamp_min(0)  # [z, x]
    assert torch.allclose(table.exit_rate[0, 0], rates.sum(-1))
    leaves = rates.sum(-1) > 1e-12
    assert torch.allclose(table.mean_distance[0, 0][leaves], (rates @ d / rates.sum(-1))[leaves])
