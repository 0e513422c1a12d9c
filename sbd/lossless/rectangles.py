"""Values of drafts, of which each sequence has its own number, as rectangles for the device."""

import torch
from torch import Tensor

from decoding.forward.transfer import to_device
from sbd.lossless.state import SpeculativeState


def draft_distributions(states: list[SpeculativeState], drawn_from: Tensor, drafts: Tensor) -> Tensor:
    """q [B, M, V] of ``drafts`` [B, M]: the distributions ``drawn_from`` [N, V], all mass on the token for other sources."""
    drawn = [i for i, state in enumerate(states) if state.draft.hidden is not None]
    table = rectangle(drawn_from, [len(states[i].draft.tokens) - 1 for i in drawn])
    if len(drawn) == len(states) and table.shape[1] == drafts.shape[1]:
        return table
    every = torch.zeros(*drafts.shape, drawn_from.shape[-1], dtype=drawn_from.dtype, device=drawn_from.device)
    every.scatter_(2, drafts[..., None], 1)
    every[to_device(drawn, drawn_from.device), : table.shape[1]] = table
    return every


def rectangle(values: Tensor, counts: list[int]) -> Tensor:
    """``values`` [N, ...], ``counts[b]`` + 1 of each sequence, as [B, M + 1, ...]; a sequence's last fills its row up."""
    most = max(counts)
    if min(counts) == most:
        return values.view(len(counts), most + 1, *values.shape[1:])
    starts = [sum(counts[:b]) + b for b in range(len(counts))]
    index = [[start + min(j, n) for j in range(most + 1)] for start, n in zip(starts, counts, strict=True)]
    return values[to_device(index, values.device)]
