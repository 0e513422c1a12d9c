"""Tell what is added to a model about the rows of the running forward: which are block rows, which token each predicts.

An adapter that is gated by block rows acts on mask rows only, so that causal rows, their keys and values and the text
they verify are those of the untouched base model. An offset code acts on rows that predict another than the next token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_block_rows: ContextVar[Tensor | None] = ContextVar("block_rows", default=None)
_offsets: ContextVar[Tensor | None] = ContextVar("offsets", default=None)


@contextmanager
def marked_block_rows(is_block: Tensor | None) -> Iterator[None]:
    """Mark the block rows ([B, R] bool, None if there are none) of the forwards run inside."""
    token = _block_rows.set(is_block)
    try:
        yield
    finally:
        _block_rows.reset(token)


def block_rows() -> Tensor | None:
    """The block rows of the running forward, [B, R] bool; None where all rows are causal, as they are outside."""
    return _block_rows.get()


@contextmanager
def marked_offsets(offset: Tensor) -> Iterator[None]:
    """Say which token each row of the forwards run inside predicts, relative to its own: [B, R] integers, 1 is the next."""
    token = _offsets.set(offset)
    try:
        yield
    finally:
        _offsets.reset(token)


def offsets() -> Tensor | None:
    """The offsets of the running forward's rows, [B, R]; None outside, where all rows predict the next token."""
    return _offsets.get()
