"""Verify drafts so that the emitted text follows the next-token distribution exactly: the second pure decision.

Shapes: B sequences, M the most drafts of any, V vocabulary. Row j of a sequence's M + 1 is the next-token distribution
p_{j+1} of draft j + 1 given the true text before it; row ``lengths[b]`` that of the token behind all of its drafts. Rows,
drafts and numbers beyond a sequence's own are never looked at. Nothing here waits for the device.

Source: speculative rejection, arXiv 2211.17192 and 2302.01318.
"""

import torch
from torch import Tensor

from decoding.sampling import inverse_cdf


def verify_greedy(likeliest: Tensor, drafts: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Accept drafts [B, M] while they equal the likeliest tokens [B, M + 1].

    lengths: [B], how many drafts each sequence has, M by default.

    Returns accepted [B] and the token [B] that follows them.

    >>> verify_greedy(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9]]), torch.tensor([2]))
    (tensor([1]), tensor([6]))
    """
    accepted = _count_accepted(drafts == likeliest[:, :-1], lengths)
    return accepted, likeliest.gather(1, accepted[:, None])[:, 0]


def verify_sampled(
    p: Tensor, drafts: Tensor, lengths: Tensor | None, q: Tensor | None, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept or correct drafts [B, M] by random tests; returns accepted [B] and the token [B] that follows them.

    lengths: as in :func:`verify_greedy`. p: [B, M + 1, V] probabilities. q: [B, M, V], the distributions q_j from which
    the drafts were drawn, given those before them where they depend on each other: draft j passes with probability
    min(1, p_j(d_j) / q_j(d_j)), else the token is drawn from the normalised (p_j - q_j)+. For drafts that come from
    anywhere q_j is all at d_j, or q is None: they pass with probability p_j(d_j), else the token is drawn from p_j without
    d_j. uniform: [B, M + 1] in [0, 1), float64: one for each test, the last for the token.

    The ratio test is exact only where it was decided to verify draft j before it was drawn: by q_j and what came before,
    never by d_j or anything that depends on it. Of independent drafts all q_j are known before.
    """
    odds = p[:, :-1].gather(-1, drafts[..., None])[..., 0]
    if q is not None:
        odds = odds / q.gather(-1, drafts[..., None])[..., 0]
    accepted = _count_accepted(uniform[:, :-1] < odds, lengths)  # what is compared with nan fails, too
    sequence = torch.arange(len(p), device=p.device)
    rest = p[sequence, accepted]
    if drafts.shape[1]:
        failed = accepted.clamp_max(drafts.shape[1] - 1)  # the draft that did not pass, where one did not
        if q is None:
            corrected = rest.scatter(1, drafts[sequence, failed][:, None], 0)
        else:
            corrected = (rest - q[sequence, failed]).clamp_min(0)
        rest = torch.where((accepted < (drafts.shape[1] if lengths is None else lengths))[:, None], corrected, rest)
    return accepted, inverse_cdf(rest, uniform[:, -1])


def _count_accepted(passed: Tensor, lengths: Tensor | None) -> Tensor:
    """How many tests each sequence ``passed`` [B, M] bool before the first that failed, or before its ``lengths`` [B]."""
    if lengths is not None:
        passed = passed & (torch.arange(passed.shape[1], device=passed.device) < lengths[:, None])
    return passed.cumprod(1).sum(1)
