"""Documents to rows of equal length, none of which lets one document see another."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

# A document is {"input_ids": [n], "targets": [n]}: tokens, and which of them are to be learned.
Document = dict


class PackedDataset(Dataset):
    """Rows of ``sequence_length`` tokens: {"input_ids", "document_ids"} int64 [L] and "loss_mask" bool [L].

    Documents follow each other in the given order; one that does not fit goes on in the next row as a document of its
    own. The incomplete last row and rows without any target are left out.
    """

    def __init__(self, documents: Iterable[Document], sequence_length: int):
        rows = list(pack(documents, sequence_length))
        if not rows:
            raise ValueError(
                f"the data holds fewer tokens to learn than one row of sequence_length {sequence_length}: give more data "
                f"or a smaller sequence_length"
            )
        self.tokens, self.documents, self.targets = (
            torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _item(self.tokens[index], self.documents[index], self.targets[index])


class StreamedRows(IterableDataset):
    """The same rows from documents that are read while training and never held whole."""

    def __init__(self, documents: Iterable[Document], sequence_length: int):
        self.source, self.sequence_length = documents, sequence_length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if get_worker_info() is not None:
            raise ValueError(
                "training.dataloader_num_workers must be 0 with streaming: true, or rows come several times"
            )
        for row in pack(self.source, self.sequence_length):
            yield _item(*map(torch.from_numpy, row))


def pack(documents: Iterable[Document], length: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, document numbers and targets of one row after another, each an array [length]."""
    columns = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, bool))
    waiting, number = [], 0
    documents = iter(documents)
    while chunk := list(islice(documents, 1024)):
        for document in chunk:
            tokens = np.asarray(document["input_ids"], np.int32)
            waiting.append((tokens, np.full_like(tokens, number), np.asarray(document["targets"], bool)))
            number += 1
        columns = tuple(np.concatenate(parts) for parts in zip(columns, *waiting, strict=True))
        waiting.clear()
        whole = len(columns[0]) // length
        for i in range(whole):
            row = tuple(column[i * length : (i + 1) * length] for column in columns)
            if row[2].any():
                yield row
        columns = tuple(column[whole * length :] for column in columns)


def _item(tokens: Tensor, documents: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens.long(), "document_ids": documents.long(), "loss_mask": targets}
