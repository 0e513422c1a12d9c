"""Packed training rows: several documents in one row, none seeing another.

A batch is a dictionary of ``input_ids`` [B, L], ``document_ids`` [B, L] (-1 is padding) and optionally ``loss_mask``
[B, L] bool, True where a token is to be learned (all tokens of a document if absent). Shared by the objectives of
every method.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

HEAD_CHUNK = 2**27  # logits that are held at once: half a gigabyte in float32


@dataclass(frozen=True)
class Packing:
    """Where the documents of a packed batch lie; all tensors [B, L].

    ``index`` is the token's index in the packed row; ``start`` and ``end`` are the indices that bound its document;
    ``position`` is its position in that document, index - start. A padding token is a document of its own.
    """

    index: Tensor
    start: Tensor
    end: Tensor
    position: Tensor
    is_padding: Tensor

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> "Packing":
        """From [B, L] integers; neighbours of one document have the same, padding has -1."""
        batch, length = document_ids.shape
        index = torch.arange(length, device=document_ids.device).expand(batch, length)
        is_padding = document_ids < 0
        begins = torch.ones_like(is_padding)
        begins[:, 1:] = document_ids[:, 1:].ne(document_ids[:, :-1]) | is_padding[:, 1:]
        start = torch.where(begins, index, 0).cummax(dim=1).values
        ends = torch.ones_like(is_padding)
        ends[:, :-1] = begins[:, 1:]
        end = torch.where(ends, index + 1, length).flip(1).cummin(dim=1).values.flip(1)
        return cls(index, start, end, index - start, is_padding)


def find_loss_mask(batch: dict[str, Tensor], packing: Packing) -> Tensor:
    """[B, L] bool: the tokens to be learned."""
    given = batch.get("loss_mask")
    return ~packing.is_padding if given is None else given.bool() & ~packing.is_padding


def next_token_rows(packing: Packing, loss_mask: Tensor) -> Tensor:
    """[B, L] bool: rows whose *next* token is to be learned (``loss_mask`` [B, L]) and lies in the same document."""
    has_next = packing.index + 1 < packing.end
    return has_next & loss_mask.roll(-1, dims=1)


def next_token_losses(model, hidden: Tensor, tokens: Tensor, packing: Packing, loss_mask: Tensor) -> Tensor:
    """Next-token cross-entropies in nats, float32 [N], of causal rows ``hidden`` [B, L, D] of ``tokens`` [B, L]."""
    rows = next_token_rows(packing, loss_mask)
    return row_losses(model, hidden[rows], tokens.roll(-1, dims=1)[rows])


def row_losses(model, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies in nats, float32 [N], of rows ``hidden`` [N, D] against ``labels`` [N], all that the head sees."""

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model.get_output_embeddings()(hidden).float(), labels, reduction="none")

    return in_chunks(losses, model.config.vocab_size, hidden, labels)


def in_chunks(function, vocabulary: int, *rows: Tensor) -> Tensor:
    """``function(*rows)`` [N, ...], some of the N rows at a time, so that at most HEAD_CHUNK logits exist at once.

    What one call needs for its gradient is computed again in the backward pass.
    """
    size = max(1, HEAD_CHUNK // vocabulary)
    if len(rows[0]) <= size:
        return function(*rows)
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
