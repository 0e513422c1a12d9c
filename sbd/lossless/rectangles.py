"""Values of drafts, of which each sequence has its own number, as rectangles for the device."""

import torch
from torch import Tensor

from decoding.forward.transfer import to_device
from sbd.lossless.state import SpeculativeState


def draft_distributions(
    states: list[SpeculativeState], drawn_from: Tensor | None, drafts: Tensor, vocab_size: int
) -> Tensor | None:
    """q [B, M, V] of ``drafts`` [B, M], all mass on the token for sources other than mask rows; None if there are no others.

    drawn_from: processed logits [N, V] of the rows that independent drafts were drawn from.
    """
    alone = [i for i, state in enumerate(states) if state.draft.hidden is not None]
    in_turn = [(i, state.draft.candidates) for i, state in enumerate(states) if state.draft.candidates is not None]
    if drawn_from is None and not in_turn:
        return None
    every = torch.zeros(*drafts.shape, vocab_size, device=drafts.device).scatter_(2, drafts[..., None], 1)
    if drawn_from is not None:
        own = rectangle(drawn_from.softmax(-1), [len(states[i].draft.tokens) - 1 for i in alone])
        if len(alone) == len(states) and own.shape[1] == drafts.shape[1]:
            return own
        every[to_device(alone, drafts.device), : own.shape[1]] = own
    for i, candidates in in_turn:
        every[i, : len(candidates.ids)] = candidates.spread(vocab_size)
    return every


def rectangle(values: Tensor, counts: list[int]) -> Tensor:
    """``values`` [N, ...], ``counts[b]`` + 1 of each sequence, as [B, M + 1, ...]; a sequence's last fills its row up."""
    most = max(counts)
    if min(counts) == most:
        return values.view(len(counts), most + 1, *values.shape[1:])
    starts = [sum(counts[:b]) + b for b in range(len(counts))]
    index = [[start + min(j, n) for j in range(most + 1)] for start, n in zip(starts, counts, strict=True)]
    return values[to_device(index, values.device)]
