"""Probability paths: the law of the noisy text X_t between the source (t = 0) and the data (t = 1).

Given x0 and x1 every position is independent of the others. Shapes: B sequences, L positions, V vocabulary; ``x0``,
``x1`` [B, L] ids; ``t`` [B], or [B, L] for a time of its own at each position (a time per block). ValueError for t
outside [0, 1]. Sources: arXiv 2407.15595 (mixture), 2412.03487 (metric).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dfm.beta_schedules import BetaSchedule
from dfm.draws import Draws
from dfm.schedulers import Scheduler
from dfm.sources import Source, UniformSource


class Noised(NamedTuple):
    """X_t [B, L], and where it is noise: ``hidden`` [B, L] bool, what the network has to predict with a mask source."""

    tokens: Tensor
    hidden: Tensor


class Path(ABC):
    """A family of laws p_t(x | x0, x1) for one position; ``source`` is the law of x0."""

    source: Source

    @abstractmethod
    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, draws: Draws) -> Noised:
        """X_t given x0 and x1."""

    @abstractmethod
    def marginal(self, x1: Tensor, t: Tensor) -> Tensor:
        """p_t(x | x1) [B, L, V] in the dtype of ``t``, with x0 drawn from the source."""

    @abstractmethod
    def dmarginal(self, x1: Tensor, t: Tensor) -> Tensor:
        """d p_t(x | x1) / dt [B, L, V]."""


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
    """p_t = k_1 delta_{x1} + sum_j k_j w_j + k_0 delta_{x0}, with fixed laws w_j in the middle.

    weights, dweights: functions of t that give [..., J] numbers, their time derivatives; order: data, the laws, source.
    They must be at least 0 with sum 1, all data at t = 1 and all source at t = 0 (checked on a grid).
    laws: [J - 2, V].
    """

    source: Source
    weights: Callable[[Tensor], Tensor]
    dweights: Callable[[Tensor], Tensor]
    laws: Tensor

    def __post_init__(self):
        weights = self.weights(torch.linspace(0, 1, 101, dtype=torch.float64))
        ends = weights.new_zeros(2, len(self.laws) + 2)
        ends[0, -1] = ends[1, 0] = 1
        convex = bool((weights >= 0).all()) and torch.allclose(weights.sum(-1), weights.new_ones(()))
        if weights.shape[-1] != len(self.laws) + 2 or not convex or not torch.allclose(weights[[0, -1]], ends):
            raise ValueError(
                f"weights must be {len(self.laws) + 2} numbers of at least 0 with sum 1, (0, .., 0, 1) at t = 0 and "
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
        for j, law in enumerate(self.laws, start=1):
            tokens = torch.where(part == j, draws.unigram(law, everywhere), tokens)
        return Noised(tokens, part > 0)

    def marginal(self, x1: Tensor, t: Tensor) -> Tensor:
        return self._combine(self.weights(per_position(t)), x1, t)

    def dmarginal(self, x1: Tensor, t: Tensor) -> Tensor:
        return self._combine(self.dweights(per_position(t)), x1, t)

    def _combine(self, weights: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        noise = torch.cat([self.laws.to(t), self.source.probabilities(t)[None]])
        return weights[..., :1] * delta(x1, self.source.vocab_size, t) + weights[..., 1:] @ noise


@dataclass(frozen=True)
class MetricPath(Path):
    """p_t(x | x1) ~ p(x) exp(-beta_t d(x, x1)): from the source law p to the data through ever nearer tokens.

    distance: x1 [...] -> d [..., V], the distances of all tokens to the data tokens in use, 0 at x1 and above 0
    elsewhere. The source must give every data token a positive probability (UniformSource: the path of arXiv
    2412.03487).
    """

    source: Source
    schedule: BetaSchedule
    distance: Callable[[Tensor], Tensor]

    def at_beta(self, distances: Tensor, beta: Tensor) -> Tensor:
        """p_beta [..., V] for distances [..., V] and beta [..., 1], which may be infinite."""
        # infinity times the distance 0 is not a number
        cost = torch.where(distances > 0, beta * distances, 0)
        return (self.source.probabilities(distances).log() - cost).softmax(-1)

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, draws: Draws) -> Noised:
        tokens = draws.categorical(self.marginal(x1, t.double()), torch.ones_like(x1, dtype=torch.bool))
        return Noised(tokens, tokens != x1)

    def marginal(self, x1: Tensor, t: Tensor) -> Tensor:
        beta = self.schedule.at(x1).beta(per_position(t))
        return self.at_beta(self.distance(x1).to(t), beta[..., None].expand(*x1.shape, 1))

    def dmarginal(self, x1: Tensor, t: Tensor) -> Tensor:
        distances, law = self.distance(x1).to(t), self.marginal(x1, t)
        dbeta = self.schedule.at(x1).dbeta(per_position(t))[..., None]
        return dbeta * law * ((law * distances).sum(-1, keepdim=True) - distances)


@dataclass(frozen=True, eq=False)
class EmbeddingDistance:
    """d(x, x1) = |e_x - e_x1|^4 of normalised rows of a token embedding [V, D], as in FUDOKI.

    Equal rows are at distance 0: the path then ends in a law over both tokens.
    """

    embedding: Tensor

    def __call__(self, x1: Tensor) -> Tensor:
        """[..., V] for data tokens [...]; nothing of the size V x V is built."""
        rows = normalize(self.embedding, dim=-1)
        squared = (2 - 2 * rows[x1] @ rows.T).clamp_min(0)
        return squared.scatter(-1, x1[..., None], 0) ** 2


def per_position(t: Tensor) -> Tensor:
    """t [B] or [B, L] as [B, 1] or [B, L]; ValueError outside [0, 1]."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must be in [0, 1], got {t.min():g} to {t.max():g}")
    return t[:, None] if t.dim() == 1 else t


def delta(tokens: Tensor, vocab_size: int, like: Tensor) -> Tensor:
    """delta_x [..., V] in the dtype of ``like``."""
    zeros = torch.zeros(*tokens.shape, vocab_size, dtype=like.dtype, device=tokens.device)
    return zeros.scatter_(-1, tokens[..., None], 1)
