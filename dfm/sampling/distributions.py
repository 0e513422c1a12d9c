"""From rates to the distribution of a step: Euler's rule and that of tau-leaping."""

import warnings

import torch
from torch import Tensor

from dfm.rates.velocities import ForwardVelocity, Velocity, check_rates, jumps_only
from dfm.sampling.state import FlowState


def free_rates(rates: Tensor, state: FlowState) -> Tensor:
    """Rates [B, L, V] of the jumps at free positions, 0 elsewhere and at the current token; checked."""
    rates = torch.where(state.free[..., None], rates, 0)
    check_rates(rates, state.x)
    return jumps_only(rates, state.x).clamp_min(0)


def forward_hazard(velocity: Velocity, t: Tensor) -> Tensor | None:
    """dkappa/(1 - kappa) [B], for the forward velocity of a mixture with one kappa for all data tokens; else None."""
    if not isinstance(velocity, ForwardVelocity) or not velocity.path.scheduler.is_shared:
        return None
    scheduler = velocity.path.scheduler
    return scheduler.dkappa(t) / (1 - scheduler.kappa(t))


def at_most_one(total: Tensor) -> Tensor:
    """Jump probabilities cut at 1, with a warning."""
    if bool((total > 1 + 1e-5).any()):
        warnings.warn(
            f"Euler: jump probabilities sum to {total.max():.3g} and are scaled to 1; use more steps", stacklevel=2
        )
    return total.clamp_max(1)


def euler_distribution(x: Tensor, rates: Tensor, h: Tensor) -> Tensor:
    """[B, L, V] for jump rates [B, L, V] and step sizes h [B]."""
    jumps = h.to(rates)[:, None, None] * rates
    total = jumps.sum(-1, keepdim=True)
    at_most_one(total)
    jumps = jumps / total.clamp_min(1)
    return jumps.scatter_add(-1, x[..., None], (1 - total).clamp_min(0))


def leap_distribution(x: Tensor, rates: Tensor, h: Tensor, several: str) -> Tensor:
    """[B, L, V] of tau-leaping for jump rates [B, L, V] and step sizes h [B].

    With exit rate lambda the first of any jumps goes to v with (1 - exp(-h lambda)) u_v / lambda; exactly one jump, to
    v, has probability h u_v exp(-h lambda).
    """
    h = h.to(rates)[:, None, None]
    exit_rate = rates.sum(-1, keepdim=True)
    if several == "first":
        jumps = -torch.expm1(-h * exit_rate) * rates / exit_rate.masked_fill(exit_rate == 0, 1)
    else:
        jumps = h * rates * torch.exp(-h * exit_rate)
    return jumps.scatter_add(-1, x[..., None], 1 - jumps.sum(-1, keepdim=True))
