"""Blocks in training: where they lie in packed rows, and what the rows of a clean and a corrupted copy see."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.forward.visibility import Visibility
from decoding.training.packed import Packing


@dataclass(frozen=True)
class BlockGrid:
    """The block of every token of a packed row: indices [start, end), both [B, L]. No block crosses a document."""

    size: int
    start: Tensor
    end: Tensor

    @classmethod
    def from_packing(cls, packing: Packing, loss_mask: Tensor, size: int, phase: str = "document") -> "BlockGrid":
        """Blocks of ``size`` tokens, the last of a document shorter.

        phase: where the grid starts: at each "document", at a "random" offset to it, or for "response" also anew
            wherever ``loss_mask`` [B, L] bool changes.
        """
        segment_start, segment_end = packing.start, packing.end
        if phase == "response":
            # A segment is a run of equal `loss_mask` in a document: give each run an id and bound it like a document.
            run = (loss_mask.long().diff(dim=1, prepend=loss_mask[:, :1].long()) != 0).cumsum(1)
            runs = Packing.from_document_ids(torch.where(packing.is_padding, -1, packing.start * (run.max() + 1) + run))
            segment_start, segment_end = runs.start, runs.end
        # A shifted grid has a first block of `shift` tokens; counting from shift - size lets one formula serve both.
        shift = int(torch.randint(size, ())) if phase == "random" else 0
        origin = segment_start + shift - (size if shift else 0)
        start = origin + (packing.index - origin).div(size, rounding_mode="floor") * size
        return cls(size, torch.maximum(start, segment_start), torch.minimum(start + size, segment_end))


def check_block_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """``sizes`` as a tuple; raises ValueError unless they are one or more numbers of tokens."""
    listed = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    if not listed or not all(type(size) is int and size >= 1 for size in sizes):
        shown = tuple(sizes) if listed else sizes
        raise ValueError(f"block_sizes must be one or more sizes of at least 1, such as [8], got {shown!r}")
    return tuple(sizes)


def draw_block_size(sizes: Sequence[int]) -> int:
    """One of ``sizes``, all equally likely, from torch's generator."""
    return sizes[int(torch.randint(len(sizes), ()))]


def set_block_visibility(packing: Packing, grids: Sequence[BlockGrid]) -> Visibility:
    """Rows of [clean copy | a masked copy for each grid] of L tokens each (figure 7 of the paper as two intervals)."""
    length, copies = packing.index.shape[1], len(grids)
    nothing = torch.zeros_like(packing.index)
    # Padding sees itself alone, in every copy.
    prefix_ends = [torch.where(packing.is_padding, packing.start, blocks.start) for blocks in grids]
    offsets = [length * (1 + copy) for copy in range(copies)]
    return Visibility(
        prefix_start=packing.start.repeat(1, 1 + copies),
        prefix_end=torch.cat([packing.index + 1, *prefix_ends], dim=1),
        own_start=torch.cat([nothing, *(grid.start + by for grid, by in zip(grids, offsets, strict=True))], dim=1),
        own_end=torch.cat([nothing, *(grid.end + by for grid, by in zip(grids, offsets, strict=True))], dim=1),
        anchor=packing.index.repeat(1, 1 + copies),
    )
