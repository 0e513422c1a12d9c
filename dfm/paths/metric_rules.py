"""Jump rules of metric paths: with which probability a token jumps between times t and s, given the data token x1.

Where it jumps to is always u / lambda, the normalised rates of :class:`dfm.rates.conditional.MetricVelocity`. A
metric path has no finite-step kernel in closed form; these are three stand-ins. ``distances`` d(., x1) [B, L, V]; ``p``,
``p_next`` the distributions at t and s [B, L, V]; ``step`` = beta_s - beta_t [B, L, 1]. In the clock of beta the rates are
p_beta(x) pos(d(z) - d(x)), free of the poles of d beta/dt. A rule gives [B, L, V], the probability of jumping away from
every token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class JumpTable(NamedTuple):
    """For every token of departure [B, L, V]: the exit rate in the clock of beta, and the mean distance jumped to."""

    exit_rate: Tensor
    mean_distance: Tensor

    @classmethod
    def of(cls, distances: Tensor, p: Tensor) -> "JumpTable":
        """From running sums over tokens in order of distance, in O(V log V)."""
        ordered, index = distances.sort(dim=-1)
        mass = p.gather(-1, index)
        m0, m1, m2 = ((mass * ordered**power).cumsum(-1) for power in (0, 1, 2))
        # Tokens at the same distance are in the sums, where they count for nothing.
        exit_rate = (ordered * m0 - m1).clamp_min(0)
        mean = torch.where(exit_rate > 0, (ordered * m1 - m2) / exit_rate, ordered)
        place = torch.empty_like(exit_rate)
        return cls(place.scatter(-1, index, exit_rate), place.scatter(-1, index, mean))


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def exponential(distances: Tensor, p: Tensor, p_next: Tensor, step: Tensor) -> Tensor:
    """1 - exp(-step lambda): exact as the step goes to 0."""
    return -torch.expm1(-step * JumpTable.of(distances, p).exit_rate)


def matched(distances: Tensor, p: Tensor, p_next: Tensor, step: Tensor) -> Tensor:
    """``exponential`` with the step that brings E[d] from its value under p to its value under p_next, by bisection."""
    table = JumpTable.of(distances, p)
    gain = p * (distances - table.mean_distance)
    wanted = ((p - p_next) * distances).sum(-1, keepdim=True)
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted) * 1000 * step
    for _ in range(60):
        middle = (low + high) / 2
        short = (gain * -torch.expm1(-middle * table.exit_rate)).sum(-1, keepdim=True) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return -torch.expm1(-high * table.exit_rate)


def moment(distances: Tensor, p: Tensor, p_next: Tensor, step: Tensor) -> Tensor:
    """(d(z) - E_{p_next}[d]) / (d(z) - E_jump[d]), or ``exponential`` outside [0, 1] (GibbsTTS, arXiv 2605.09386).

    It pulls every token to the mean and so does not preserve the marginals of the path, not even in small steps.
    """
    table = JumpTable.of(distances, p)
    probability = (distances - (p_next * distances).sum(-1, keepdim=True)) / (distances - table.mean_distance)
    valid = (table.exit_rate > 0) & (probability >= 0) & (probability <= 1)
    return torch.where(valid, probability, -torch.expm1(-step * table.exit_rate))


METRIC_RULES: dict[str, Rule] = {"exp": exponential, "matched": matched, "moment": moment}
