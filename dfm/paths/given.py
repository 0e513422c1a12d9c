"""Conditioning on given tokens (infilling): the source that keeps them, and which are given in training.

x0 = I x1 + (1 - I) x0', where I marks the given tokens; sampling starts at t = 0 from the same state with the given
tokens frozen. With the mask source a network sees by itself what is given; with any other source it must be told I,
since a clean token looks like a noisy one. ``tokens`` [B, L] bool marks what is not padding.
"""

import torch
from torch import Tensor

from dfm.draws import Draws


def keep_given(x0: Tensor, x1: Tensor, given: Tensor) -> Tensor:
    """The source [B, L] with the tokens ``given`` [B, L] bool taken from the data."""
    return torch.where(given, x1, x0)


def draw_prefix(tokens: Tensor, draws: Draws) -> Tensor:
    """Given: a prefix, its length uniform from none to all tokens but one."""
    first = _one_each(tokens)
    length = (draws.uniform(first).sum(-1) * tokens.sum(-1)).long()
    return tokens & (_place(tokens) < length[:, None])


def draw_share(tokens: Tensor, draws: Draws) -> Tensor:
    """Given: each token with probability r, r ~ U(0, 1) for each sequence."""
    share = draws.uniform(_one_each(tokens)).sum(-1, keepdim=True)
    return tokens & (draws.uniform(tokens) < share)


def draw_outside_span(tokens: Tensor, draws: Draws) -> Tensor:
    """Given: all but one span, whose two ends are drawn uniformly."""
    first = _one_each(tokens)
    ends = [(draws.uniform(first).sum(-1) * tokens.sum(-1)).long() for _ in range(2)]
    place, low, high = _place(tokens), torch.minimum(*ends)[:, None], torch.maximum(*ends)[:, None]
    return tokens & ((place < low) | (place > high))


def _place(tokens: Tensor) -> Tensor:
    """Index [B, L] of a token among the tokens of its sequence."""
    return tokens.long().cumsum(-1) - 1


def _one_each(tokens: Tensor) -> Tensor:
    """[B, L] bool: the first token of each sequence, to draw one number for it."""
    return tokens & (_place(tokens) == 0)
