"""Schedules of metric paths: the inverse temperature beta_t, from 0 (source) to infinity (data).

Sources: arXiv 2412.03487 for the path, FUDOKI and GibbsTTS (arXiv 2605.09386) for the schedules.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding.inputs.checks import check_count, check_range


class BetaSchedule(ABC):
    """A rising beta with beta(0) = 0. ``t`` is a tensor of any shape, results have the same shape."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """beta_t."""

    @abstractmethod
    def dbeta(self, t: Tensor) -> Tensor:
        """d beta / dt."""

    def at(self, x1: Tensor) -> "BetaSchedule":
        """The schedule of the data tokens ``x1``, where it differs between them."""
        return self


@dataclass(frozen=True)
class PowerBeta(BetaSchedule):
    """beta_t = scale (t / (1 - t))^power. Pairs in use: (3, 0.9) and (1, 5).

    With power < 1 the slope at t = 0 is infinite: rates do not exist there, finite steps do.
    """

    scale: float = 3.0
    power: float = 0.9

    def __post_init__(self):
        check_range("scale", self.scale, 0, include_low=False)
        check_range("power", self.power, 0, include_low=False)

    def beta(self, t: Tensor) -> Tensor:
        return self.scale * (t / (1 - t)) ** self.power

    def dbeta(self, t: Tensor) -> Tensor:
        return self.scale * self.power * t ** (self.power - 1) / (1 - t) ** (self.power + 1)


@dataclass(frozen=True, eq=False)
class ConstantSpeedBeta(BetaSchedule):
    """A beta_t along which (d beta/dt) sqrt(Var[d]) is constant (GibbsTTS, arXiv 2605.09386).

    Var[d], the variance of the distance under p_beta, is the Fisher information in beta. Made by :meth:`fit`.

    table: beta at evenly spaced times, [points] for all x1 or [N, points] for N tokens x1; straight lines in between.
    """

    table: Tensor

    @classmethod
    def fit(
        cls, distances: Tensor, source: Tensor, *, average: bool = True, points: int = 1000, rest: float = 1e-9
    ) -> "ConstantSpeedBeta":
        """Tabulate the arc length over beta and invert it.

        distances: d(., x1) of N tokens x1, float64 [N, V]. source: distribution at beta = 0, [V]. average: one schedule for the
        mean Fisher information of the N tokens instead of one for each. The table ends where a token other than x1 has
        at most the probability ``rest``.
        """
        check_count("points", points, 2)
        check_range("rest", rest, 0, 1, include_low=False, include_high=False)
        nearest = distances[distances > 0].min()
        end = (1 / (rest * source[source > 0].min())).log() / nearest
        beta = end * torch.linspace(0, 1, 4 * points, dtype=torch.float64).expand(1 if average else len(distances), -1)
        # Each pass puts the grid of beta where the one before found the arc length to be.
        for _ in range(4):
            variance = torch.stack([_variance(distances, source, b[:, None]) for b in beta.unbind(-1)], dim=-1)
            if average:
                variance = variance.mean(0, keepdim=True)
            beta = _even_in_length(variance.sqrt(), beta, 4 * points)
        table = beta[:, torch.linspace(0, 4 * points - 1, points).round().long()]
        return cls(table[0] if average else table)

    def at(self, x1: Tensor) -> "ConstantSpeedBeta":
        return self if self.table.dim() == 1 else replace(self, table=self.table[x1])

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = self.table.shape[-1] - 1
        i = (t * cells).long().clamp(0, cells - 1)
        table = self.table.to(t)
        if table.dim() == 1:
            return t * cells - i, table[i], table[i + 1]
        i = i.expand(table.shape[:-1])[..., None]
        return t * cells - i[..., 0], table.gather(-1, i)[..., 0], table.gather(-1, i + 1)[..., 0]

    def beta(self, t: Tensor) -> Tensor:
        share, start, end = self._piece(t)
        return start + share * (end - start)

    def dbeta(self, t: Tensor) -> Tensor:
        _, start, end = self._piece(t)
        return (end - start) * (self.table.shape[-1] - 1)


def _variance(distances: Tensor, source: Tensor, beta: Tensor) -> Tensor:
    """Variance [N] of the distance under p_beta(x) ~ source(x) exp(-beta d(x))."""
    p = (source.log() - beta * distances).softmax(-1)
    mean = (p * distances).sum(-1, keepdim=True)
    return (p * (distances - mean) ** 2).sum(-1)


def _even_in_length(speed: Tensor, beta: Tensor, count: int) -> Tensor:
    """``count`` points [N, count] that cut the integral of speed over beta, both [N, points], in equal parts."""
    length = torch.cumulative_trapezoid(speed, beta, dim=-1)
    length = torch.cat([torch.zeros_like(length[:, :1]), length], dim=-1)
    wanted = length[:, -1:] * torch.linspace(0, 1, count, dtype=torch.float64)
    i = torch.searchsorted(length, wanted, right=True).clamp(1, beta.shape[-1] - 1)
    before, after = length.gather(-1, i - 1), length.gather(-1, i)
    share = ((wanted - before) / (after - before).clamp_min(1e-300)).clamp(0, 1)
    return torch.lerp(beta.gather(-1, i - 1), beta.gather(-1, i), share)
