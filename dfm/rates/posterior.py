"""Posteriors: what the network says about the clean text x1 (and the source text x0) given the noisy text."""

from typing import Protocol

import torch
from torch import Tensor

from dfm.paths.path import delta


class PosteriorModel(Protocol):
    """The network behind every sampler: noisy text in, logits of the data tokens out.

    x: [B, L] ids, mask tokens included. t: [B] float64, or ignored by a model of a mask source, whose posterior does
    not depend on time. frozen: [B, L] bool, tokens known to be clean (prompt) or of no interest (padding, finished).
    Returns logits [B, L, V]; the logit of the mask token, and rows of tokens that are revealed, may be anything.
    A model of transitions takes ``until`` and ``noise`` of a :class:`dfm.sampling.state.Query` besides, by name.
    """

    def __call__(self, x: Tensor, t: Tensor, frozen: Tensor) -> Tensor: ...


def posterior_distribution(
    logits: Tensor,
    x: Tensor,
    masked: Tensor,
    mask_id: int | None,
    *,
    carry_over: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """p_1t [B, L, V] from logits [B, L, V], in float32, or float64 if the logits are.

    The mask token gets probability 0. With a mask source (``mask_id`` not None) and ``carry_over``, positions that are
    not ``masked`` [B, L] keep their token with certainty. temperature, top_p: sharpen the distribution; samplers are then no
    longer exact with respect to the network. temperature 0 is the likeliest token.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id is not None:
        logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -torch.inf)
    distribution = sharpen(logits, temperature, top_p)
    if mask_id is not None and carry_over and not bool(masked.all()):
        distribution = torch.where(masked[..., None], distribution, delta(x, distribution.shape[-1], distribution))
    return distribution


def sharpen(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities [..., V] at a temperature, cut to the fewest tokens whose sum reaches ``top_p`` (nucleus)."""
    if temperature == 0:
        return delta(logits.argmax(-1), logits.shape[-1], logits)
    distribution = (logits if temperature == 1 else logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = distribution.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        outside[..., 0] = False
        distribution = distribution.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0)
        distribution = distribution / distribution.sum(-1, keepdim=True)
    return distribution


def noise_posterior(p1: Tensor, z: Tensor, k: Tensor, source: Tensor) -> Tensor:
    """p_0t(x | X_t) [B, L, V]: the distribution of the source token, from p_1t, for a mixture with independent source [V].

    With z the token of the position:

        p_0t(x) = (1 - p_1t(z)) delta_z(x) + p_1t(z) [(1 - k) p(z) delta_z(x) + k p(x)] / [(1 - k) p(z) + k]

    k = kappa_t, broadcast to [B, L].
    """
    stays = delta(z, p1.shape[-1], p1)
    p1_z, p_z, k = p1.gather(-1, z[..., None]), source[z][..., None], k[..., None]
    total = (1 - k) * p_z + k
    redrawn = p1_z * k / total.masked_fill(total == 0, 1)
    return (1 - redrawn) * stays + redrawn * source


def leave_one_out(logits: Tensor, z: Tensor, k: Tensor, source: Tensor) -> Tensor:
    """Logits [..., V] of x1 at each position given the *other* positions only, for a mixture with source distribution [V].

    Subtracts log(1 + k / ((1 - k) p(z))) at the observed token z; log(1 + V k / (1 - k)) with a uniform source. Needs k
    < 1. ``logits`` may be log p_1t.
    """
    observed = torch.log1p(k / ((1 - k) * source[z]))
    return logits.scatter_add(-1, z[..., None], -observed[..., None].to(logits))
