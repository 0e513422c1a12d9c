"""What one forward pass computes: for every sequence a list of rows, padded to a rectangle.

Shapes: B sequences, R rows.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding.forward.noise_level import NONE
from decoding.forward.visibility import Visibility


@dataclass
class RowList:
    """The rows of one sequence, in the order in which they will lie in the forward.

    ``offset`` is the place of the token that a causal row predicts, relative to the row's own token: 1 is the next one.
    ``level`` says how noisy a block row's token is (:mod:`decoding.forward.noise_level`).
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    prefix_end: list[int] = field(default_factory=list)
    own_start: list[int] = field(default_factory=list)
    own_end: list[int] = field(default_factory=list)
    is_block: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    level: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add_causal(self, tokens: SequenceOf[int], start: int) -> None:
        """Add text from position ``start`` on; each row sees everything up to itself. Its slots are its positions."""
        end = start + len(tokens)
        self._add(tokens, range(start, end), range(start, end), range(start + 1, end + 1), 0, 0)

    def add_block(
        self, tokens: SequenceOf[int], position: int, slot: int, levels: SequenceOf[int] | None = None
    ) -> None:
        """Add a block from ``position`` on, in slots from ``slot`` on; its rows see all before it and each other.

        ``levels``: how noisy its tokens are, for models that are told (:mod:`decoding.forward.noise_level`).
        """
        positions, end = range(position, position + len(tokens)), slot + len(tokens)
        levels = NONE if levels is None else levels
        self._add(tokens, positions, range(slot, end), position, slot, end, is_block=1, level=levels)

    def add_branch(
        self,
        tokens: SequenceOf[int],
        positions: SequenceOf[int],
        offsets: SequenceOf[int],
        prefix_end: int,
        slot: int,
    ) -> None:
        """Add another continuation of the text before ``prefix_end``, in slots from ``slot`` on.

        Each row sees that text and the branch up to itself; ``offsets`` say which token each predicts, 1 being the next.
        """
        end = slot + len(tokens)
        self._add(tokens, positions, range(slot, end), prefix_end, slot, range(slot + 1, end + 1), offset=offsets)

    def add_padding(self, count: int, slot: int) -> None:
        """Add rows that stand for nothing: each sees only itself, in ``slot``, which no other row sees."""
        self._add([0] * count, 0, slot, 0, slot, slot + 1)

    def _add(
        self,
        tokens: SequenceOf[int],
        positions: SequenceOf[int] | int,
        slots: SequenceOf[int] | int,
        prefix_end: SequenceOf[int] | int,
        own_start: SequenceOf[int] | int,
        own_end: SequenceOf[int] | int,
        is_block: int = 0,
        offset: SequenceOf[int] | int = 1,
        level: SequenceOf[int] | int = NONE,
    ) -> None:
        """Extend every column; a number stands for all rows."""
        given = (tokens, positions, slots, prefix_end, own_start, own_end, is_block, offset, level)
        for column, values in zip(vars(self).values(), given, strict=True):
            column.extend([values] * len(tokens) if isinstance(values, int) else values)


@dataclass(frozen=True)
class Rows:
    """A rectangle of rows, ready for the model. Tensors are [B, R]; ``counts`` says how many rows are real.

    ``has_blocks`` says without a look at the device whether any row is a block row.
    """

    tokens: Tensor
    positions: Tensor
    visibility: Visibility
    is_block: Tensor
    offset: Tensor
    level: Tensor
    slots: Tensor | slice
    num_slots: int
    counts: tuple[int, ...]
    has_blocks: bool

    @classmethod
    def pack(cls, lists: SequenceOf[RowList], device: torch.device) -> "Rows":
        """Pad to the longest list. A padding row sees only itself, in a scratch slot behind all others."""
        counts = tuple(map(len, lists))
        width = max(counts)
        num_slots = max(max(rows.slots, default=-1) for rows in lists) + 1
        if min(counts) < width:
            scratch, num_slots = num_slots, num_slots + 1
            for rows in lists:
                rows.add_padding(width - len(rows), scratch)
        columns = torch.tensor([list(vars(rows).values()) for rows in lists]).to(device)
        tokens, positions, slots, prefix_end, own_start, own_end, is_block, offset, level = columns.unbind(1)
        visibility = Visibility(torch.zeros_like(slots), prefix_end, own_start, own_end, anchor=positions)
        first = lists[0].slots[0]
        if len(lists) == 1 and lists[0].slots == list(range(first, first + width)):
            slots = slice(first, first + width)  # a view is written faster than an index
        has_blocks = any(1 in rows.is_block for rows in lists)
        return cls(tokens, positions, visibility, is_block.bool(), offset, level, slots, num_slots, counts, has_blocks)
