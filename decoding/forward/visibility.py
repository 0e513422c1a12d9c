"""Which keys each row of a forward pass may see: the union of two intervals of slots.

Shapes: B batch, R rows, K key slots. A row is (token, position, slot, visible keys). The *prefix* interval holds the
past; the *own* interval holds the block that the row belongs to, seen in both directions. Prompts, blocks of masks,
training copies and look-ahead branches are all of this form, so this file builds every attention mask we use.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Row r of sequence b sees key slot j if prefix_start <= j < prefix_end or own_start <= j < own_end.

    All are integer tensors of shape [B, R]. An empty interval has start >= end; every row must see at least one slot,
    because a softmax over nothing is not a number. ``anchor`` is the prefix slot that holds, or would hold, the row's
    position: sliding windows count back from it. ``prefix_start`` None is 0 in all rows.

    >>> Visibility.causal(torch.tensor([[0, 1, 2]])).as_bool(3)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    prefix_start: Tensor | None
    prefix_end: Tensor
    own_start: Tensor
    own_end: Tensor
    anchor: Tensor

    @classmethod
    def causal(cls, slots: Tensor, start: Tensor | int = 0) -> "Visibility":
        """Rows written to ``slots`` [B, R], each seeing [start, slot]: plain next-token attention."""
        nothing = torch.zeros_like(slots)
        return cls(nothing + start, slots + 1, nothing, nothing, slots)

    def of_rows(self, rows: slice) -> "Visibility":
        """The same slots seen by ``rows`` alone."""
        columns: dict[str, Any] = {name: column[:, rows] for name, column in vars(self).items() if column is not None}
        return Visibility(**{"prefix_start": None} | columns)

    def beside(self, other: "Visibility") -> "Visibility":
        """These rows and then the ``other``, each seeing what it saw. Either both have a ``prefix_start`` or none."""
        given = [(name, column) for name, column in vars(self).items() if column is not None]
        columns: dict[str, Any] = {name: torch.cat([own, getattr(other, name)], dim=1) for name, own in given}
        return Visibility(**{"prefix_start": None} | columns)

    def within_window(self, window: int | None) -> "Visibility":
        """The same rows under a sliding window of ``window`` positions: the prefix starts later, two intervals remain."""
        if window is None:
            return self
        start = self.anchor + 1 - window
        return replace(
            self, prefix_start=start if self.prefix_start is None else torch.maximum(self.prefix_start, start)
        )

    def as_bool(self, num_slots: int) -> Tensor:
        """[B, 1, R, K] bool, True where the key is visible: what ``sdpa`` takes."""
        slot = torch.arange(num_slots, device=self.prefix_end.device)
        in_prefix = slot < self.prefix_end[..., None]
        if self.prefix_start is not None:
            in_prefix &= slot >= self.prefix_start[..., None]
        in_own = (slot >= self.own_start[..., None]) & (slot < self.own_end[..., None])
        return (in_prefix | in_own)[:, None]

    def as_float(self, num_slots: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, R, K] of 0 and the dtype's minimum: what ``eager`` adds to the scores (a bool would be added as 0/1)."""
        hidden = ~self.as_bool(num_slots)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)

    def as_block_mask(self, num_slots: int):
        """A FlexAttention ``BlockMask`` over [B, R, K], which skips tiles that nobody sees."""
        from torch.nn.attention.flex_attention import create_block_mask

        start = torch.zeros_like(self.prefix_end) if self.prefix_start is None else self.prefix_start

        def visible(b, h, row, slot):
            in_prefix = (slot >= start[b, row]) & (slot < self.prefix_end[b, row])
            in_own = (slot >= self.own_start[b, row]) & (slot < self.own_end[b, row])
            return in_prefix | in_own

        batch, rows = self.prefix_end.shape
        return create_block_mask(visible, batch, None, rows, num_slots, device=self.prefix_end.device)
