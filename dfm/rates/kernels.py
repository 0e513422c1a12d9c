"""Finite-step kernels of mixture paths: from time t to time s in one exact step, instead of step size times rate.

Given the data token x1 a kernel takes one of three routes at each position: to x1, to fresh noise from the source distribution
p, or it stays. k = kappa_t and k_next = kappa_s broadcast to [B, L, V], with the last axis over x1 where they differ
between data tokens, else of size 1. All are exact given x1 for every step size; a sampler replaces x1 by its posterior,
which leaves the error of treating positions as independent.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dfm.paths.path import delta


class Routes(NamedTuple):
    """Probabilities of the routes to data and to noise given x1; what is left stays. Broadcast to [B, L, V] over x1."""

    data: Tensor
    noise: Tensor

    def distribution(self, z: Tensor, p1: Tensor, source: Tensor) -> Tensor:
        """The distribution [B, L, V] of the next token from the current ones z, under the posterior p1, with source
        distribution [V].

        With a mask source ``data`` acts on masked and ``noise`` on revealed positions only, so each must be at most 1
        by itself; otherwise their sum must be.
        """
        to_data = self.data * p1
        to_noise = (self.noise * p1).sum(-1, keepdim=True)
        stays = p1.sum(-1, keepdim=True) - to_data.sum(-1, keepdim=True) - to_noise
        return (to_data + to_noise * source).scatter_add_(-1, z[..., None], stays)


def forward_kernel(k: Tensor, k_next: Tensor) -> Routes:
    """p_t to p_s: to x1 with (k' - k) / (1 - k). With a mask source this is ancestral sampling."""
    return Routes((k_next - k) / (1 - k), torch.zeros_like(k))


def backward_kernel(k: Tensor, k_next: Tensor) -> Routes:
    """p_s back to p_t: to noise with (k' - k) / k'."""
    return Routes(torch.zeros_like(k), (k_next - k) / k_next)


def mixed_kernel(k: Tensor, k_next: Tensor, beta: Tensor) -> Routes:
    """p_t to p_s with correction: to x1 with (1 + beta) (k' - k) / (1 - k), to noise with beta (k' - k) / k.

    beta must be at most :func:`largest_beta`. No noise where k = 0.
    """
    step = k_next - k
    return Routes((1 + beta) * step / (1 - k), torch.where(k > 0, beta * step / k, 0))


def largest_beta(k: Tensor, k_next: Tensor, is_mask: bool) -> Tensor:
    """The beta up to which the mixed kernel has probabilities: k (1 - k') / (k' - k), or min(k, 1 - k') / (k' - k)."""
    return (torch.minimum(k, 1 - k_next) if is_mask else k * (1 - k_next)) / (k_next - k)


def farthest_kappa(k: Tensor, beta: Tensor) -> Tensor:
    """The k' up to which the mixed kernel has probabilities: k' - k = 1 / ((1 + beta) / (1 - k) + beta / k).

    At k = 0 the step has no noise, so the bound is that of pure prediction.
    """
    beta = torch.where(k > 0, beta, 0)
    return k + 1 / ((1 + beta) / (1 - k) + torch.where(k > 0, beta / k, 0))


def frozen_kernel(k: Tensor, strength: Tensor | float, is_mask: bool) -> Routes:
    """p_t to itself: to x1 with e / (1 - k), to noise with e / k, for e = strength times the largest possible one.

    That is k (1 - k), or min(k, 1 - k) with a mask source.
    """
    if is_mask:
        return Routes(strength * (k / (1 - k)).clamp_max(1), strength * ((1 - k) / k).clamp_max(1))
    return Routes(strength * k, strength * (1 - k))


def remask_kernel(k: Tensor, k_next: Tensor, sigma: Tensor) -> Routes:
    """p_t to p_s for a mask source: revealed -> mask with sigma, mask -> x1 with (k' - (1 - sigma) k) / (1 - k).

    sigma: at most min(1, (1 - k') / k). sigma = beta (k' - k) / k is the mixed kernel. ReMDM, arXiv 2503.00307.
    """
    return Routes((k_next - (1 - sigma) * k) / (1 - k), sigma)


def reversal_kernel(k: Tensor, k_next: Tensor, z: Tensor, source: Tensor) -> Routes:
    """q(x_s | x_t = z, x1) for any source distribution [V] by Bayes, p_t to p_s; for the uniform source D3PM (arXiv
    2107.03006).

    With a = k / k' and b = k' the weights are
    data: b (1 - a) p(z) + a b [z = x1];  stay: a (1 - b) p(z);  noise: (1 - a) (1 - b) p(z).
    """
    a, b, p_z = k / k_next, k_next, source[z][..., None]
    data = b * (1 - a) * p_z + a * b * delta(z, source.shape[-1], p_z)
    noise = (1 - a) * (1 - b) * p_z
    total = data + noise + a * (1 - b) * p_z
    total = total.masked_fill(total == 0, 1)  # z cannot be reached from this x1
    return Routes(data / total, noise / total)
