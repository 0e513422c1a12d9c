"""Velocities: rates of jumping from the current token to any other that move a path's distribution through time.

u(x, z) is the rate of z -> x at one position. A velocity produces a path if sum_z u(x, z) p_t(z) = d p_t(x) / dt. Rates
are vectors [B, L, V] over destinations x for the current tokens z [B, L], with the diagonal x = z such that they sum to
0; a V x V matrix is never built. ``t`` is [B]; ``p1`` = p_1t [B, L, V]. Rates are per unit of time.
Sources: arXiv 2407.15595, 2412.03487 and Generator Matching, 2410.20587.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice, check_range
from dfm.paths.mixture import ConvexSumPath, MixturePath
from dfm.paths.path import delta, per_position
from dfm.rates.posterior import noise_posterior

Noise = Literal["posterior", "fresh"]
NOISES = ("posterior", "fresh")


class Velocity(ABC):
    """Rates given the data, and their mean under the posterior. ``a * u + b * v`` is a velocity again.

    With a + b = 1 it produces the path if both do. If a or b is negative, its rates may be: see :func:`check_rates`.
    """

    @abstractmethod
    def at(self, z: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Rates [B, L, V] given the data tokens x1 [B, L]."""

    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        """sum_{x1} p_1t(x1) u(., z | x1) [B, L, V].

        Takes V times as long as ``at`` unless the class knows better; samplers that draw x1 first need ``at`` only.
        """
        total = torch.zeros_like(p1)
        for token in range(p1.shape[-1]):
            total += p1[..., token, None] * self.at(z, torch.full_like(z, token), t.to(p1))
        return total

    def __add__(self, other: "Velocity") -> "Velocity":
        return Superposition(((1.0, self), (1.0, other)))

    def __rmul__(self, scale: float) -> "Velocity":
        return Superposition(((scale, self),))


@dataclass(frozen=True)
class Superposition(Velocity):
    """sum_i a_i u_i, what ``a * u + b * v`` makes."""

    parts: tuple[tuple[float, Velocity], ...]

    def at(self, z: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return sum(scale * velocity.at(z, x1, t) for scale, velocity in self.parts)

    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        return sum(scale * velocity.marginal(z, t, p1) for scale, velocity in self.parts)


class LinearVelocity(Velocity):
    """A velocity whose marginal has a closed form that is linear in p_1t; given the data p_1t is delta_{x1}."""

    path: MixturePath | ConvexSumPath

    @abstractmethod
    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        """Rates [B, L, V]."""

    def at(self, z: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return self.marginal(z, t, delta(x1, self.path.source.vocab_size, t))


@dataclass(frozen=True)
class ForwardVelocity(LinearVelocity):
    """u(x, z) = dkappa/(1 - kappa) [p_1t(x) - delta_z(x)] on a mixture: noise turns into data. Needs t < 1."""

    path: MixturePath

    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        t, scheduler = per_position(t)[..., None], self.path.scheduler
        hazard = scheduler.dkappa(t) / (1 - scheduler.kappa(t))
        return with_diagonal(hazard.to(p1) * p1, z)


@dataclass(frozen=True)
class BackwardVelocity(LinearVelocity):
    """u(x, z) = dkappa/kappa [delta_z(x) - q(x)] on a mixture: data turns into noise, read backwards. Needs t > 0.

    Its off-diagonals are negative: run with time reversed it produces the path. noise: q is "posterior" p_0t, or
    "fresh", the source distribution p, which jumps more often and to the same effect.
    """

    path: MixturePath
    noise: Noise = "fresh"

    def __post_init__(self):
        check_choice("noise", self.noise, NOISES)

    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        source = self.path.source.probabilities(p1)
        if self.noise == "posterior":
            # Only a token that is data can have been noise, so kappa is that of the data token z.
            scheduler, time = self.path.scheduler.at(z), per_position(t)
            kappa = scheduler.kappa(time)
            q = noise_posterior(p1, z, kappa.to(p1), source)
            rate = (scheduler.dkappa(time) / kappa)[..., None].to(p1)
        else:
            scheduler, time = self.path.scheduler, per_position(t)[..., None]
            q = source
            rate = ((scheduler.dkappa(time) / scheduler.kappa(time)).to(p1) * p1).sum(-1, keepdim=True)
        return with_diagonal(-rate * q, z)


@dataclass(frozen=True)
class CorrectorSchedule:
    """beta_t = scale t^rise (1 - t)^fall; (10, 0.25, 0.25) for text, (12, 2, 0.25) for images (arXiv 2407.15595)."""

    scale: float = 10.0
    rise: float = 0.25
    fall: float = 0.25

    def __post_init__(self):
        for name in ("scale", "rise", "fall"):
            check_range(name, getattr(self, name), 0)

    def __call__(self, t: Tensor) -> Tensor:
        return self.scale * t**self.rise * (1 - t) ** self.fall


@dataclass(frozen=True)
class CorrectorVelocity(LinearVelocity):
    """u = (1 + beta_t) forward - beta_t backward on a mixture: predicts and corrects at once, and produces the path.

    beta_t is set to 0 where kappa = 0, since the backward rate is infinite there. Needs t < 1.
    """

    path: MixturePath
    beta: CorrectorSchedule = CorrectorSchedule()
    noise: Noise = "fresh"

    def __post_init__(self):
        check_choice("noise", self.noise, NOISES)

    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        forward = ForwardVelocity(self.path).marginal(z, t, p1)
        backward = BackwardVelocity(self.path, self.noise).marginal(z, t, p1)
        beta = self.beta(t).to(p1)[:, None, None]
        return torch.where(backward.isfinite().all(-1, keepdim=True), forward + beta * (forward - backward), forward)


@dataclass(frozen=True, eq=False)
class ConvexVelocity(LinearVelocity):
    """The velocity of a path sum_j k_j w_j, with r = min_j dk_j / k_j:

        u(x, z) = sum_j (dk_j - k_j r) E[w_j(x) | X_t = z] + r delta_z(x)

    Terms with k_j = 0 do not count for r. Off-diagonals are at least 0; with ``backward`` r is the maximum, which makes
    them at most 0 and needs k_j > 0 wherever dk_j > 0. Two terms give the velocities of the mixture.
    """

    path: ConvexSumPath
    backward: bool = False

    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        k, dk = (weights(per_position(t)).to(p1) for weights in (self.path.weights, self.path.dweights))
        if self.backward and bool(((k == 0) & (dk > 0)).any()):
            raise ValueError(f"t must be where no weight rises from 0, got {t.tolist()}")
        ratio = torch.where(k > 0, dk / k, -torch.inf if self.backward else torch.inf)
        r = ratio.amax(-1, keepdim=True) if self.backward else ratio.amin(-1, keepdim=True)
        distributions = [p1, *self.path.distributions.to(p1), self._source_distribution(z, k, p1)]
        rates = sum((dk - k * r)[..., j, None] * distribution for j, distribution in enumerate(distributions))
        return with_diagonal(rates, z)

    def _source_distribution(self, z: Tensor, k: Tensor, p1: Tensor) -> Tensor:
        """p_0t: the source token given z, by Bayes: P(x0, z | x1) = p(x0) (k_1 [z = x1] + middle(z) + k_0 [z = x0])."""
        source = self.path.source.probabilities(p1)
        p_z, p1_z = source[z][..., None], p1.gather(-1, z[..., None])
        middle = (k[..., 1:-1] @ self.path.distributions.to(p1)).expand_as(p1).gather(-1, z[..., None])
        redrawn = 0
        for weight, share in ((middle + k[..., :1], p1_z), (middle, 1 - p1_z)):
            total = weight + k[..., -1:] * p_z
            redrawn = redrawn + share * weight / total.masked_fill(total == 0, 1)
        return redrawn * source + (1 - redrawn) * delta(z, p1.shape[-1], p1)


def with_diagonal(jumps: Tensor, z: Tensor) -> Tensor:
    """Rates [B, L, V] with the entry of the current token z [B, L] replaced by minus the sum of the others."""
    index = z[..., None]
    jumps = jumps.scatter(-1, index, 0)
    return jumps.scatter(-1, index, -jumps.sum(-1, keepdim=True))


def jumps_only(rates: Tensor, z: Tensor) -> Tensor:
    """Rates [B, L, V] with the entry of the current token set to 0."""
    return rates.scatter(-1, z[..., None], 0)


def check_rates(rates: Tensor, z: Tensor, tolerance: float = 1e-5) -> None:
    """Raise ValueError unless all rates [B, L, V] but that of the current token are finite and at least 0.

    ``tolerance`` is relative to the largest rate.
    """
    jumps = jumps_only(rates, z)
    if not bool(jumps.isfinite().all()):
        raise ValueError("rates must be finite, got infinite or undefined ones; is t 0 or 1?")
    if bool((jumps < -tolerance * jumps.abs().max()).any()):
        raise ValueError(f"rates must be at least 0 off the current token, got {jumps.min():g}")
