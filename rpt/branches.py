"""Branches: previous-token rows beside the plain text, in the layout in which decoding runs them.

A text with reordered windows gives few previous-token targets and takes next-token targets away. Here the plain text
stays as it is, and behind it stand rows that each see the text before a token x_i and the w - 1 tokens after it, and
predict x_i.
Shapes: B rows, L tokens of each, N branches a row, w - 1 rows of each branch.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from decoding.forward.visibility import Visibility
from decoding.training.packed import Packing
from rpt.config import ResampleConfig


@dataclass(frozen=True)
class Branches:
    """Rows [B, N (w - 1)] behind the L of the plain text: their tokens' indices, positions, offsets, what they see.

    ``index`` [B, N] is that of the token that the last row of a branch predicts, ``is_real`` [B, N] whether it is to be
    learned; the others fill the rectangle.
    """

    token: Tensor
    position: Tensor
    offset: Tensor
    visibility: Visibility
    index: Tensor
    is_real: Tensor

    @classmethod
    def draw(cls, config: ResampleConfig, packing: Packing, loss_mask: Tensor, generator=None) -> "Branches":
        """In a share s of the rows as many as a share q of all L tokens is, or as many as there may be.

        Each starts at a token in ``loss_mask`` [B, L], none at a document's border.
        """
        batch, length = loss_mask.shape
        w, device = config.window, loss_mask.device
        eligible = loss_mask & (packing.position > 0) & (packing.index + w <= packing.end)
        drawn = torch.rand(batch, length, generator=generator).to(device).masked_fill(~eligible, 2)
        taken = torch.rand(batch, 1, generator=generator).to(device) < config.sequence_share
        index = drawn.topk(ceil(config.window_share * length), largest=False).indices.sort(dim=1).values
        is_real = eligible.gather(1, index) & taken

        step = torch.arange(w - 1, device=device)
        shift = 1 if config.rope_index == "slot" else 0  # where rpt.previous_rows puts them, too
        at = index[..., None] + 1 - shift + step
        first = length + (w - 1) * torch.arange(index.shape[1], device=device)[:, None]

        def rows(values: Tensor) -> Tensor:
            return values.expand(*index.shape, w - 1).flatten(1)

        start = packing.start.gather(1, index)
        visibility = Visibility(
            prefix_start=rows(start[..., None]),
            prefix_end=rows(index[..., None]),
            own_start=rows(first),
            own_end=rows(first + step + 1),
            anchor=rows(at),
        )
        token = rows(index[..., None] + 1 + step).clamp_max(length - 1)
        offset = rows(torch.where(is_real[..., None] & (step == w - 2), 1 - w, 1))
        return cls(token, rows(at - start[..., None]), offset, visibility, index, is_real)
