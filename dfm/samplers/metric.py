"""Steps of metric paths given x1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice
from dfm.paths.metric import MetricPath
from dfm.paths.metric_rules import METRIC_RULES
from dfm.paths.path import delta
from dfm.sampling.grid import GivenDataSampler
from dfm.sampling.state import FlowState


@dataclass(frozen=True)
class MetricX1(GivenDataSampler):
    """Steps of a metric path by one of the jump rules in :mod:`dfm.paths.metric_rules`: "exp", "matched" or "moment".

    Unlike EulerX1 it takes finite differences of beta, so that a schedule of infinite slope at t = 0 does no harm.
    """

    sources = ()  # metric paths, which no decoder makes

    path: MetricPath
    rule: str = "exp"

    def __post_init__(self):
        super().__post_init__()
        check_choice("rule", self.rule, METRIC_RULES)

    def distribution_given(self, state: FlowState, x1: Tensor, s: Tensor) -> Tensor:
        return metric_distribution(self.path, self.rule, state.x, x1, state.t, s)


def metric_distribution(path: MetricPath, rule: str, z: Tensor, x1: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """[B, L, V]: the next token from z [B, L] given x1 [B, L], from times t to s [B]."""
    distances, schedule = path.distance(x1).to(t), path.schedule.at(x1)
    beta = schedule.beta(t[:, None])[..., None].expand(*x1.shape, 1)
    beta_next = schedule.beta(s[:, None])[..., None].expand(*x1.shape, 1)
    p, p_next = path.at_beta(distances, beta), path.at_beta(distances, beta_next)
    probability = METRIC_RULES[rule](distances, p, p_next, beta_next - beta).gather(-1, z[..., None])
    nearer = p * (distances.gather(-1, z[..., None]) - distances).clamp_min(0)
    exit_rate = nearer.sum(-1, keepdim=True)
    stays = torch.where(exit_rate > 0, 1 - probability, 1)
    return (1 - stays) * nearer / exit_rate.masked_fill(exit_rate == 0, 1) + stays * delta(z, p.shape[-1], p)
