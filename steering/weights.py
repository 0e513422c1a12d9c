"""Weights of particles: how many of them count, and who goes on. Pure functions.

Shapes: N particles. Log-weights are float64, in nats; -inf is a particle that is ruled out.
"""

import math

import torch
from torch import Tensor

from decoding.sampling import inverse_cdf


def log_mean(log_weights: Tensor) -> float:
    """Logarithm of the mean weight of ``log_weights`` [N].

    >>> log_mean(torch.tensor([0.0, -torch.inf]).double()) == math.log(0.5)
    True
    """
    return float(log_weights.logsumexp(-1)) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of ``log_weights`` [N]: N if all are alike, 1 if one has all the weight, 0 if none has any.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, -torch.inf]).double())
    2.0
    """
    if bool((log_weights == -torch.inf).all()):
        return 0.0
    weights = (log_weights - log_weights.max()).exp()
    return float(weights.sum() ** 2 / (weights**2).sum())


def systematic(log_weights: Tensor, uniform: float) -> list[int]:
    """Ancestors of N particles, drawn by systematic resampling with one number ``uniform`` in [0, 1).

    Particle i is expected N w_i times and comes at least the whole part of that often. Whoever goes on keeps its place, so
    only the places of the others need be written.

    >>> systematic(torch.tensor([0.5, 0.0, 0.5, 0.0]).double().log(), 0.3)
    [0, 0, 2, 2]
    """
    count = len(log_weights)
    positions = (torch.arange(count, dtype=torch.float64) + uniform).div(count).clamp_max(1 - 2**-52)
    drawn = inverse_cdf(log_weights.softmax(-1).expand(count, -1), positions).tolist()
    again = iter([ancestor for i, ancestor in enumerate(drawn) if ancestor in drawn[:i]])
    kept = set(drawn)
    return [place if place in kept else next(again) for place in range(count)]
