"""Tell adapters which rows of the running forward are block rows.

An adapter that is gated by them acts on mask rows only, so that causal rows, their keys and values and the text they
verify are those of the untouched base model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_block_rows: ContextVar[Tensor | None] = ContextVar("block_rows", default=None)


@contextmanager
def marked_block_rows(is_block: Tensor) -> Iterator[None]:
    """Mark the block rows ([B, R] bool) of the forwards run inside."""
    token = _block_rows.set(is_block)
    try:
        yield
    finally:
        _block_rows.reset(token)


def block_rows() -> Tensor | None:
    """The block rows of the running forward, [B, R] bool; None outside, where all rows are causal."""
    return _block_rows.get()
