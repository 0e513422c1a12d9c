"""Classifier-free guidance in three places: the logits, the distribution of a step, the rates.

w is the guidance weight: 0 is the conditional distribution itself, larger follows the condition more.
"""

import torch
from torch import Tensor

from dfm.rates.velocities import jumps_only, with_diagonal


def guide_logits(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Logits of p ~ p_cond^(1 + w) p_uncond^(-w). Tokens that the condition excludes stay excluded."""
    if weight == 0:
        return conditional
    guided = (1 + weight) * conditional.log_softmax(-1) - weight * unconditional.log_softmax(-1)
    return torch.where(conditional == -torch.inf, -torch.inf, guided)


def guide_distribution(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """The distribution of a step, q ~ q_cond^(1 + w) q_uncond^(-w) (1 + w is gamma in Duo, arXiv 2506.10892)."""
    if weight == 0:
        return conditional
    return guide_logits(conditional.log(), unconditional.log(), weight).softmax(-1)


def guide_rates(
    conditional: Tensor, unconditional: Tensor, z: Tensor, weight: float, renormalise: bool = False
) -> Tensor:
    """Rates u_cond^(1 + w) u_uncond^(-w) off the current tokens z [...].

    On a mixture with mask source this is ``guide_logits`` times sum_x p_cond^(1 + w) p_uncond^(-w), which changes how
    often tokens jump; ``renormalise`` gives each token the exit rate of the conditional rates.
    """
    if weight == 0:
        return conditional
    jumps, other = jumps_only(conditional, z), jumps_only(unconditional, z)
    guided = torch.where(jumps > 0, jumps * (jumps / other) ** weight, 0)
    if renormalise:
        total = guided.sum(-1, keepdim=True)
        guided = guided * jumps.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
    return with_diagonal(guided, z)
