"""Documents to rows of equal length, none of which lets one document see another."""

import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

# A document is {"input_ids": [n], "loss_mask": [n]}: tokens, and which of them are to be learned.
Document = dict
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, document numbers and loss mask, all [n]

OPEN_ROWS = 256  # rows among which an example looks for the place that it fits best


class PackedDataset(Dataset):
    """Rows of ``sequence_length`` tokens: {"input_ids", "document_ids"} int64 [L] and "loss_mask" bool [L], as of :func:`pack`.

    ``name`` is for messages. Warns of examples that are longer than a row; raises ValueError if there is nothing to learn.
    """

    def __init__(self, documents: Iterable[Document], sequence_length: int, name: str = "data"):
        cut = LongExamples(sequence_length)
        rows = list(pack(cut.counted(documents), sequence_length))
        if not rows:
            raise ValueError(f"{name} holds no token to learn, in rows of sequence_length {sequence_length}")
        if cut.count:
            warnings.warn(f"{name}: {cut}", stacklevel=2)
        self.tokens, self.documents, self.loss_masks = (
            torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)
        )

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return int((self.documents >= 0).sum())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _item(self.tokens[index], self.documents[index], self.loss_masks[index])


class StreamedRows(IterableDataset):
    """The same rows from documents that are read while training and never held whole; an epoch at each iteration."""

    def __init__(self, documents: Iterable[Document], sequence_length: int):
        self.source, self.sequence_length = documents, sequence_length

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the documents, which is another one in each epoch."""
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if get_worker_info() is not None:
            raise ValueError(
                "training.dataloader_num_workers must be 0 with streaming: true, or rows come several times"
            )
        cut = LongExamples(self.sequence_length, warn_of_first=True)
        for row in pack(cut.counted(self.source), self.sequence_length):
            yield _item(*map(torch.from_numpy, row))


class EndlessRows(IterableDataset):
    """One epoch of ``rows`` behind the other without an end.

    For a trainer they are one epoch, so that it finds its place again after so and so many steps, wherever that is.
    """

    def __init__(self, rows: StreamedRows):
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for epoch in count():
            self.rows.set_epoch(epoch)
            rows = iter(self.rows)
            first = next(rows, None)
            if first is None:
                raise ValueError(
                    f"data holds no token to learn, in rows of sequence_length {self.rows.sequence_length}"
                )
            yield first
            yield from rows


def pack(documents: Iterable[Document], length: int) -> Iterator[Columns]:
    """Tokens, document numbers and loss mask of one row after another, each an array [length].

    Plain texts, of which all is learned, follow each other in the given order; one that does not fit goes on in the next
    row as a document of its own, and an incomplete last row is left out unless it is the only one. An example, that is a
    document with a prompt, stays whole: it goes into the row whose space it leaves the least of (best-fit packing), and
    what stays free is padding, of document number -1. One that is longer than a row is cut as plain texts are. Rows without
    any target are left out.
    """
    return (row for row in _all_rows(documents, length) if row[2].any())


def _all_rows(documents: Iterable[Document], length: int) -> Iterator[Columns]:
    texts, examples, found = _Cut(length), _BestFit(length), False
    for number, document in enumerate(documents):
        tokens, loss_mask = np.asarray(document["input_ids"], np.int32), np.asarray(document["loss_mask"], bool)
        columns = tokens, np.full_like(tokens, number), loss_mask
        is_whole = len(tokens) <= length and not loss_mask.all()
        for row in (examples if is_whole else texts).add(columns):
            found = True
            yield row
    for row in examples.rest():
        found = True
        yield row
    if not found:
        yield _padded(texts.waiting, length)


class LongExamples:
    """Counts the examples that are longer than a row, of which all but the first piece is trained without its prompt."""

    def __init__(self, length: int, warn_of_first: bool = False):
        self.length, self.warn_of_first = length, warn_of_first
        self.count = self.all = 0

    def counted(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.all += 1
            if len(document["input_ids"]) > self.length and not np.all(document["loss_mask"]):
                self.count += 1
                if self.count == 1 and self.warn_of_first:
                    warnings.warn(f"data: {self}", stacklevel=2)
            yield document

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.all} documents have a prompt and are longer than sequence_length {self.length}: they "
            f"are cut, and what follows the cut is trained without its prompt"
        )


class _Cut:
    """Documents one behind the other, cut wherever a row ends."""

    def __init__(self, length: int):
        self.length, self.waiting, self.size = length, [], 0

    def add(self, columns: Columns) -> Iterator[Columns]:
        self.waiting.append(columns)
        self.size += len(columns[0])
        if self.size < self.length:
            return
        joined = tuple(np.concatenate(parts) for parts in zip(*self.waiting, strict=True))
        whole = self.size - self.size % self.length
        for start in range(0, whole, self.length):
            yield tuple(column[start : start + self.length] for column in joined)
        self.waiting, self.size = [tuple(column[whole:] for column in joined)], self.size - whole


class _BestFit:
    """Documents each of which is put into the open row that has the least space left for it."""

    def __init__(self, length: int):
        self.length = length
        self.spaces: list[int] = []  # of the open rows, ascending
        self.rows: list[list[Columns]] = []

    def add(self, columns: Columns) -> Iterator[Columns]:
        size = len(columns[0])
        place = bisect_left(self.spaces, size)
        space, row = (self.spaces.pop(place), self.rows.pop(place)) if place < len(self.rows) else (self.length, [])
        row.append(columns)
        if space == size:
            yield _padded(row, self.length)
            return
        place = bisect_left(self.spaces, space - size)
        self.spaces.insert(place, space - size)
        self.rows.insert(place, row)
        if len(self.rows) > OPEN_ROWS:
            self.spaces.pop(0)
            yield _padded(self.rows.pop(0), self.length)

    def rest(self) -> Iterator[Columns]:
        for row in self.rows:
            yield _padded(row, self.length)


def _padded(documents: list[Columns], length: int) -> Columns:
    free = length - sum(len(tokens) for tokens, _, _ in documents)
    padding = np.zeros(free, np.int32), np.full(free, -1, np.int32), np.zeros(free, bool)
    return tuple(np.concatenate(parts) for parts in zip(*documents, padding, strict=True))


def _item(tokens: Tensor, documents: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens.long(), "document_ids": documents.long(), "loss_mask": loss_mask}
