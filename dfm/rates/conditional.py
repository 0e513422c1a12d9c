"""Velocities that are known given the data token: kinetic-optimal, uniform-weight, metric, and time reversal.

Conventions as in :mod:`dfm.rates.velocities`. Their marginals sum over x1, so samplers draw x1 from p_1t first; the
reversal has a closed form. pos(a) = max(a, 0).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfm.paths.metric import MetricPath
from dfm.paths.mixture import MixturePath
from dfm.paths.path import Path, per_position
from dfm.rates.velocities import LinearVelocity, Velocity, with_diagonal


@dataclass(frozen=True)
class KineticOptimalVelocity(Velocity):
    """u(x, z) = pos(dp_t(x) - p_t(x) / p_t(z) dp_t(z)), for any path; on a mixture forward (arXiv 2412.03487)."""

    path: Path

    def at(self, z: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        p, dp = self.path.marginal(x1, t), self.path.dmarginal(x1, t)
        p_z, dp_z = p.gather(-1, z[..., None]), dp.gather(-1, z[..., None])
        growth = torch.where(p_z > 0, dp_z / p_z, 0)
        return with_diagonal((dp - p * growth).clamp_min(0), z)


@dataclass(frozen=True)
class UniformWeightVelocity(Velocity):
    """u(x, z) = pos(dp_t(x) - dp_t(z)) / (n p_t(z)), n the number of tokens with p_t > 0: the flux is spread evenly.

    ValueError where a token of probability 0 gains some, which no finite rate of this kind does.
    """

    path: Path

    def at(self, z: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        p, dp = self.path.marginal(x1, t), self.path.dmarginal(x1, t)
        if bool(((p == 0) & (dp != 0)).any()):
            raise ValueError("t must be a time at which no token of probability 0 gains probability")
        p_z, dp_z = p.gather(-1, z[..., None]), dp.gather(-1, z[..., None])
        count = (p > 0).sum(-1, keepdim=True)
        flux = (dp - dp_z).clamp_min(0) * (p > 0)
        return with_diagonal(torch.where(p_z > 0, flux / (count * p_z), 0), z)


@dataclass(frozen=True)
class MetricVelocity(Velocity):
    """u(x, z) = p_t(x) dbeta/dt pos(d(z, x1) - d(x, x1)): jumps towards x1 only; kinetic-optimal on its path."""

    path: MetricPath

    def at(self, z: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        distances = self.path.distance(x1).to(t)
        nearer = (distances.gather(-1, z[..., None]) - distances).clamp_min(0)
        dbeta = self.path.schedule.at(x1).dbeta(per_position(t))[..., None]
        return with_diagonal(self.path.marginal(x1, t) * dbeta * nearer, z)


@dataclass(frozen=True)
class ReversalVelocity(LinearVelocity):
    """u(x, z) = dkappa/kappa p(z) p_t(x) / p_t(z) on a mixture. Needs 0 < t < 1.

    The time reversal of the noising process that redraws from p at rate dkappa/kappa. Equals forward for the mask
    source; for the uniform source it is the limit of D3PM's ancestral step (arXiv 2107.03006) and gives the tighter
    likelihood bound. ValueError for a scheduler that differs between data tokens.
    """

    path: MixturePath

    def marginal(self, z: Tensor, t: Tensor, p1: Tensor) -> Tensor:
        source, scheduler = self.path.source.probabilities(p1), self.path.scheduler.shared()
        time = per_position(t)[..., None]
        kappa = scheduler.kappa(time).to(p1)
        p_z, p1_z = source[z][..., None], p1.gather(-1, z[..., None])
        # 1 / p_t(z | x1) takes one value for x1 = z and another for all x1 != z, where z is noise.
        inverse_if_noise = torch.where(p_z > 0, 1 / ((1 - kappa) * p_z), 0)
        inverse_mean = (1 - p1_z) * inverse_if_noise + p1_z / ((1 - kappa) * p_z + kappa)
        rates = (1 - kappa) * source * inverse_mean + kappa * p1 * inverse_if_noise
        return with_diagonal(scheduler.dkappa(time).to(p1) / kappa * p_z * rates, z)
