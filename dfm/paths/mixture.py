"""Mixture paths: every position is still source, already data, or in a convex sum of more distributions (arXiv 2407.15595)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfm.draws import Draws
from dfm.paths.path import Noised, Path, delta, per_position
from dfm.paths.schedulers import Scheduler
from dfm.paths.sources import Source, UniformSource


@dataclass(frozen=True)
class MixturePath(Path):
    """p_t = (1 - kappa_t) delta_{x0} + kappa_t delta_{x1}: every position is still source or already data."""

    source: Source
    scheduler: Scheduler

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, draws: Draws) -> Noised:
        kappa = self.scheduler.at(x1).kappa(per_position(t))
        hidden = draws.uniform(torch.ones_like(x1, dtype=torch.bool)) >= kappa
        return Noised(torch.where(hidden, x0, x1), hidden)

    def marginal(self, x1: Tensor, t: Tensor) -> Tensor:
        kappa = self.scheduler.at(x1).kappa(per_position(t))[..., None]
        return kappa * delta(x1, self.source.vocab_size, t) + (1 - kappa) * self.source.probabilities(t)

    def dmarginal(self, x1: Tensor, t: Tensor) -> Tensor:
        dkappa = self.scheduler.at(x1).dkappa(per_position(t))[..., None]
        return dkappa * (delta(x1, self.source.vocab_size, t) - self.source.probabilities(t))


@dataclass(frozen=True, eq=False)
class ConvexSumPath(Path):
    """p_t = k_1 delta_{x1} + sum_j k_j w_j + k_0 delta_{x0}, with fixed distributions w_j in the middle.

    weights, dweights: functions of t that give [..., J] numbers, their time derivatives; order: data, the
    distributions, source. They must be at least 0 with sum 1, all data at t = 1 and all source at t = 0 (checked on a grid).
    distributions: [J - 2, V].
    """

    source: Source
    weights: Callable[[Tensor], Tensor]
    dweights: Callable[[Tensor], Tensor]
    distributions: Tensor

    def __post_init__(self):
        weights = self.weights(torch.linspace(0, 1, 101, dtype=torch.float64))
        ends = weights.new_zeros(2, len(self.distributions) + 2)
        ends[0, -1] = ends[1, 0] = 1
        convex = bool((weights >= 0).all()) and torch.allclose(weights.sum(-1), weights.new_ones(()))
        if weights.shape[-1] != len(self.distributions) + 2 or not convex or not torch.allclose(weights[[0, -1]], ends):
            raise ValueError(
                f"weights must be {len(self.distributions) + 2} numbers of at least 0 with sum 1, (0, .., 0, 1) at t = 0 and "
                f"(1, 0, .., 0) at t = 1, got {weights[[0, -1]].tolist()} there"
            )

    @classmethod
    def with_uniform_noise(cls, source: Source, excluded: tuple[int, ...] = ()) -> "ConvexSumPath":
        """Weights (t^2, t - t^2, 1 - t) on data, uniform noise without the ids ``excluded``, and source."""
        uniform = UniformSource(source.vocab_size, excluded).probabilities(torch.zeros((), dtype=torch.float64))
        return cls(
            source,
            lambda t: torch.stack([t**2, t - t**2, 1 - t], dim=-1),
            lambda t: torch.stack([2 * t, 1 - 2 * t, -torch.ones_like(t)], dim=-1),
            uniform[None],
        )

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, draws: Draws) -> Noised:
        weights = self.weights(per_position(t)).expand(*x1.shape, -1)
        everywhere = torch.ones_like(x1, dtype=torch.bool)
        part = draws.categorical(weights, everywhere)
        tokens = torch.where(part == 0, x1, x0)
        for j, distribution in enumerate(self.distributions, start=1):
            tokens = torch.where(part == j, draws.unigram(distribution, everywhere), tokens)
        return Noised(tokens, part > 0)

    def marginal(self, x1: Tensor, t: Tensor) -> Tensor:
        return self._combine(self.weights(per_position(t)), x1, t)

    def dmarginal(self, x1: Tensor, t: Tensor) -> Tensor:
        return self._combine(self.dweights(per_position(t)), x1, t)

    def _combine(self, weights: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        noise = torch.cat([self.distributions.to(t), self.source.probabilities(t)[None]])
        return weights[..., :1] * delta(x1, self.source.vocab_size, t) + weights[..., 1:] @ noise
