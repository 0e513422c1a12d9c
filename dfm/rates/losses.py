"""Training losses, in nats: cross-entropy, generalised KL, and the likelihood bound for any rates.

Each gives a loss per position [B, L]; the caller chooses which positions count (all that are not given; with a mask
source only the hidden ones, for the cross-entropy) and how to average. Sources: arXiv 2407.15595, 2412.03487,
2410.20587.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dfm.paths.mixture import MixturePath
from dfm.paths.path import per_position
from dfm.rates.velocities import jumps_only


def stratified_times(count: int, generator: torch.Generator, end: float = 1 - 1e-3) -> Tensor:
    """``count`` times in [0, end), float64, one in each of as many equal parts, in random order.

    The default end keeps away from the pole of the losses at t = 1.
    """
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    return end * (torch.randperm(count, generator=generator) + offsets) / count


def denoising_loss(logits: Tensor, x1: Tensor) -> Tensor:
    """-log p_1t(x1 | X_t) [B, L] from logits [B, L, V]."""
    return cross_entropy(logits.transpose(1, 2), x1, reduction="none")


def generalised_kl(logits: Tensor, z: Tensor, x1: Tensor, t: Tensor, path: MixturePath) -> Tensor:
    """The bound for the forward velocity of a mixture [B, L], from logits [B, L, V]; needs t < 1:

        dkappa/(1 - kappa) [ 1[z = x1] - p_1t(z) - 1[z != x1] log p_1t(x1) ]

    Its integral over t in [0, 1], summed over positions, has a mean of at least -log p(x1). With a mask source it is
    dkappa/(1 - kappa) times the cross-entropy of the masked positions. ValueError for a scheduler that differs between
    data tokens, for which there is :func:`rate_bound`.
    """
    log_p1 = logits.log_softmax(-1)
    p1_z = log_p1.gather(-1, z[..., None])[..., 0].exp()
    log_p1_x1 = log_p1.gather(-1, x1[..., None])[..., 0]
    scheduler, time = path.scheduler.shared(), per_position(t)
    hazard = (scheduler.dkappa(time) / (1 - scheduler.kappa(time))).to(log_p1)
    return hazard * torch.where(z == x1, 1 - p1_z, -p1_z - log_p1_x1)


def rate_bound(rates: Tensor, model_rates: Tensor, z: Tensor) -> Tensor:
    """sum_{x != z} u log(u / u_model) - u + u_model [B, L], for rates given x1 and of the model, both [B, L, V].

    The likelihood bound for any velocity, with ``rates`` from its ``at(z, x1, t)`` and ``model_rates`` from its
    ``marginal(z, t, p1)``. With the forward velocity it is the generalised KL, with the reversal it is tighter for
    sources other than the mask.
    """
    u, u_model = jumps_only(rates, z), jumps_only(model_rates, z)
    surprise = torch.where(u > 0, u * (torch.where(u > 0, u, 1) / u_model).log(), 0)
    return (surprise - u + u_model).sum(-1)
