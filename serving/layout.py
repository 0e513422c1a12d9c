"""Which rows of a step are what: computed once per step from whole arrays, then copied to the device.

Shapes: B requests in the batch, N tokens of the forward, L rows whose logits are needed. All of it is numpy on the host;
nothing here waits for the device, and nothing loops over requests.
"""

from dataclasses import dataclass

import numpy as np

from serving.canvas import split_canvas


@dataclass(frozen=True)
class SlotTable:
    """What the worker knows of the request in each slot, set when the request arrives; all [slots]."""

    is_lossless: np.ndarray
    is_set_block: np.ndarray
    is_anchored: np.ndarray
    block_size: np.ndarray

    @classmethod
    def empty(cls, slots: int) -> "SlotTable":
        lossless, set_block, anchored = np.zeros((3, slots), dtype=bool)
        return cls(lossless, set_block, anchored, np.ones(slots, dtype=np.int64))


@dataclass(frozen=True)
class StepLayout:
    """The rows of one step.

    pending: [B] rows of text. drafts, masks: [B] rows behind them. is_verified: [B], whether causal rows decide tokens:
    drafts are tested there, and the token behind them is chosen. is_set_block: [B], whether masks are revealed.
    has_anchor: [B], whether the row before the block decides the block's first token.
    token_starts: [B] first token of each request in the forward. logit_starts: [B] the same for rows with logits, which
    are a request's causal rows, then its masks; logit_causal: [B] how many of them are causal. logit_rows: [L] tokens.
    """

    pending: np.ndarray
    drafts: np.ndarray
    masks: np.ndarray
    is_verified: np.ndarray
    is_set_block: np.ndarray
    has_anchor: np.ndarray
    token_starts: np.ndarray
    logit_starts: np.ndarray
    logit_causal: np.ndarray
    logit_masks: np.ndarray
    logit_rows: np.ndarray
    logit_requests: np.ndarray
    logit_places: np.ndarray

    @property
    def causal(self) -> np.ndarray:
        return self.pending + self.drafts


def plan_step(
    table: SlotTable, slots: np.ndarray, lengths: np.ndarray, canvas: np.ndarray, ends_prompt: np.ndarray
) -> StepLayout:
    """The layout of requests in ``slots`` [B] that run ``lengths`` [B] rows, the last ``canvas`` [B] of them behind the text.

    ends_prompt: [B], whether the last row of the text gives the next token: not in the middle of a prompt.
    """
    lossless, set_block = table.is_lossless[slots], table.is_set_block[slots]
    anchored = table.is_anchored[slots]
    drafts, masks = split_canvas(canvas, lossless, table.block_size[slots])
    pending = lengths - canvas
    # A request behind its prompt has a canvas, or no room for one; an anchored one takes its first token from the prompt.
    opened = masks > 0
    verified = ends_prompt & (~set_block | (anchored & ~opened))
    revealed = set_block & opened
    anchor = revealed & anchored & (pending > 0)
    causal_logits = np.where(verified, drafts + 1, anchor)
    # The first mask stands where the token behind the drafts goes, so it drafts nothing.
    mask_logits = np.where(revealed, masks, np.maximum(masks - 1, 0))

    starts = _starts(lengths)
    segment = np.stack([causal_logits, mask_logits], axis=1).ravel()
    ends = np.stack([starts + pending + drafts, starts + lengths], axis=1).ravel()
    segment_starts = _starts(segment)
    places = np.arange(int(segment.sum())) - np.repeat(segment_starts, segment)
    return StepLayout(
        pending=pending,
        drafts=drafts,
        masks=masks,
        is_verified=verified,
        is_set_block=revealed,
        has_anchor=anchor,
        token_starts=starts,
        logit_starts=segment_starts[::2],
        logit_causal=causal_logits,
        logit_masks=mask_logits,
        logit_rows=np.repeat(ends - segment, segment) + places,
        logit_requests=np.repeat(np.arange(len(slots)).repeat(2), segment),
        logit_places=np.where(np.repeat(np.arange(2 * len(slots)) % 2 == 0, segment), places, 0),
    )


@dataclass(frozen=True)
class VirtualRequests:
    """What the attention is told: each request is up to two, on one block table. All [V].

    A causal one holds the text and the drafts, one that is not holds the masks, which see everything up to ``seq_lens``.
    """

    requests: np.ndarray
    query_lens: np.ndarray
    seq_lens: np.ndarray
    is_causal: np.ndarray

    @property
    def query_starts(self) -> np.ndarray:
        """[V + 1]"""
        return np.concatenate([[0], np.cumsum(self.query_lens)])


def virtual_requests(layout: StepLayout, computed: np.ndarray) -> VirtualRequests:
    """The virtual requests of a step; ``computed`` [B] tokens of each request have their keys and values already."""
    lens = np.stack([layout.causal, layout.masks], axis=1)
    seen = computed[:, None] + lens.cumsum(1)
    keep = lens > 0
    where = np.nonzero(keep)
    return VirtualRequests(where[0], lens[keep], seen[keep], where[1] == 0)


def rectangle(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Indices [B, max(counts)] of rows that begin at ``starts`` [B]; what is beyond a request's own repeats its last.

    >>> rectangle(np.array([0, 3]), np.array([3, 1])).tolist()
    [[0, 1, 2], [3, 3, 3]]
    """
    steps = np.arange(counts.max(initial=0))
    return starts[:, None] + np.minimum(steps, np.maximum(counts - 1, 0)[:, None])


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts
