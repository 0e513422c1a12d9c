"""What the sampler decides, as functions of tensors: drafts are verified and masks are revealed by decoding's own rules.

Shapes: B requests, M the most drafts of any, Q the longest block, V vocabulary. Nothing here waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.rules import RevealRule, RowScores
from decoding.sampling import inverse_cdf, likeliest
from decoding.verification import verify_greedy, verify_sampled


def verify(
    scores: Tensor, rows: Tensor, drafts: Tensor, lengths: Tensor, is_greedy: Tensor | None, uniform: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Test drafts [B, M] by the rows ``rows`` [B, M + 1] of ``scores`` [L, V]; returns accepted [B] and emitted [B, M + 1].

    lengths: [B] drafts of each. is_greedy: [B]; None if all are. uniform: [B, M + 1] float64 for those that are not: a test
    of each draft, then the token's. What is emitted is the accepted drafts and the token behind them; the rest is that token.

    Drafts are the likeliest tokens of their mask rows, so each passes with its own probability: exact, and nothing of the
    size of the vocabulary is kept from forward to forward.
    """
    accepted, token = verify_greedy(likeliest(scores)[rows], drafts, lengths)
    if is_greedy is not None:
        assert uniform is not None
        sampled = verify_sampled(scores.softmax(-1)[rows], drafts, lengths, None, uniform)
        accepted = torch.where(is_greedy, accepted, sampled[0])
        token = torch.where(is_greedy, token, sampled[1])
    token = token.clamp_min(0)  # logits of nan choose nothing; vLLM emits something then, too
    kept = torch.arange(rows.shape[1], device=rows.device) < accepted[:, None]
    padded = torch.cat([drafts, token[:, None]], dim=1)
    return accepted, torch.where(kept, padded, token[:, None])


@dataclass(frozen=True)
class OpenBlocks:
    """Blocks that are being filled. tokens: [B, Q] int64. masked: [B, Q] bool, False behind a block's end. lengths: [B]."""

    tokens: Tensor
    masked: Tensor
    lengths: Tensor


def reveal(
    blocks: OpenBlocks,
    raw: Tensor,
    processed: Tensor,
    rows: Tensor,
    first: Tensor | None,
    rules: list[tuple[RevealRule, Tensor]],
    score_raw: Tensor | None,
    is_greedy: Tensor | None,
    uniform: Tensor | None,
) -> OpenBlocks:
    """Decide masked tokens by the rows ``rows`` [B, Q] of the logits ``raw`` and ``processed`` [L, V].

    first: [B, Q], tokens with an exact distribution, None if there are none. rules: each with the requests [B] bool that it
    is for. score_raw: [B], whose rule looks at raw logits; None for none. is_greedy, uniform [B, Q]: as in :func:`verify`.
    """
    logits = processed[rows]
    scores = RowScores.of(logits)
    if score_raw is not None:
        other = RowScores.of(raw[rows])
        scores = RowScores(
            *(
                torch.where(score_raw[:, None], getattr(other, name), getattr(scores, name))
                for name in ("entropy", "confidence", "margin")
            )
        )
    tokens = likeliest(logits)
    if is_greedy is not None:
        assert uniform is not None
        drawn = inverse_cdf(logits.softmax(-1).flatten(0, 1), uniform.flatten()).view_as(tokens)
        tokens = torch.where(is_greedy[:, None], tokens, drawn)
    chosen = torch.zeros_like(blocks.masked)
    for rule, is_for in rules:
        chosen |= rule(scores, blocks.masked, first) & is_for[:, None]
    return OpenBlocks(torch.where(chosen, tokens.clamp_min(0), blocks.tokens), blocks.masked & ~chosen, blocks.lengths)


def emitted_prefix(blocks: OpenBlocks, by_prefix: Tensor, ends: Tensor, room: Tensor) -> Tensor:
    """How many tokens each block emits, [B].

    by_prefix: [B], whose gapless decided prefix is emitted at once; other blocks wait until they are full, or until their
    prefix ends the text: with one of the tokens ``ends`` [B, E], -1 for none, or with the ``room`` [B] tokens that are left.
    """
    place = torch.arange(blocks.masked.shape[1], device=room.device)
    open_ = torch.where(blocks.masked, place, blocks.lengths[:, None])
    prefix = torch.minimum(open_.amin(1), blocks.lengths)
    stops = (blocks.tokens[..., None] == ends[:, None, :]).any(-1) & (place < prefix[:, None])
    done = by_prefix | (prefix == blocks.lengths) | stops.any(1) | (prefix >= room)
    return torch.where(done, prefix, 0)


def without_prefix(blocks: OpenBlocks, emitted: Tensor, mask_token: int) -> OpenBlocks:
    """Blocks without their first ``emitted`` [B] tokens; one that is used up is followed by a new one, all masked."""
    width = blocks.masked.shape[1]
    place = torch.arange(width, device=emitted.device) + emitted[:, None]
    index = place.clamp_max(width - 1)
    fresh = (place >= blocks.lengths[:, None]) | (emitted == blocks.lengths)[:, None]
    tokens = blocks.tokens.gather(1, index).masked_fill(fresh, mask_token)
    masked = blocks.masked.gather(1, index) | fresh
    return OpenBlocks(tokens, masked, blocks.lengths)
