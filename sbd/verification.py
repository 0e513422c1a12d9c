"""Verify drafts so that the emitted text follows the next-token law exactly.

Shapes: M drafts, V vocabulary. ``scores`` are processed logits [M + 1, V] of the causal rows: row j is the law p_{j+1} of
draft j + 1 given the true text before it, the last row the law of the token after all drafts.

Source: speculative rejection, arXiv 2211.17192 and 2302.01318.
"""

import torch
from torch import Tensor

from decoding.sampling import draw, uniforms


def verify_greedy(likeliest: list[int], drafts: list[int]) -> tuple[int, int]:
    """Accept drafts while they equal the likeliest tokens [M + 1]; returns (accepted, the token that follows them).

    >>> verify_greedy([5, 6, 7], [5, 9])
    (1, 6)
    """
    accepted = next((j for j, draft in enumerate(drafts) if draft != likeliest[j]), len(drafts))
    return accepted, likeliest[accepted]


def verify_sampled(
    scores: Tensor, drafts: list[int], draft_scores: Tensor | None, generator: torch.Generator
) -> tuple[int, int]:
    """Accept or correct drafts by random tests; returns (accepted, the token that follows them).

    ``draft_scores`` [M, V] are the processed logits of the laws q_j from which the drafts were drawn independently, in one
    forward: draft j passes with probability min(1, p_j(d_j) / q_j(d_j)), else the token is drawn from the
    normalised (p_j - q_j)+. With None, drafts may come from anywhere: they pass with probability p_j(d_j), else the
    token is drawn from p_j without d_j. The ratio test is exact only for drafts whose number and values depend on the laws
    alone, not on the values drawn.
    """
    p = scores.softmax(-1)
    if not drafts:
        return 0, int(draw(p[:1], [generator]))
    rows = torch.arange(len(drafts), device=p.device)
    ids = torch.tensor(drafts, device=p.device)
    q = None if draft_scores is None else draft_scores.softmax(-1)
    odds = p[rows, ids] if q is None else p[rows, ids] / q[rows, ids]
    coins = uniforms([generator] * len(drafts), p.device)
    passed = (coins < odds).tolist()
    if all(passed):
        return len(drafts), int(draw(p[-1:], [generator]))
    accepted = passed.index(False)
    rest = p[accepted].clone()
    if q is None:
        rest[ids[accepted]] = 0
    else:
        rest = (rest - q[accepted]).clamp_min(0)
    return accepted, int(draw(rest[None], [generator]))
