"""Texts to packed rows of tokens: documents in a shuffled order, cut into rows of equal length."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


def read_texts(paths: Iterable[str | Path]) -> list[str]:
    """The ``text`` fields of JSONL files."""
    texts = []
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise ValueError(f"data file {str(path)!r} does not exist") from None
        for number, line in enumerate(lines, 1):
            try:
                texts.append(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f"{path}:{number} is not a JSON object with a field 'text'") from None
    return texts


class PackedDataset(Dataset):
    """Rows of ``sequence_length`` tokens, each item {"input_ids": [L], "document_ids": [L]}, both int64.

    Documents are encoded with the tokenizer's special tokens and end with its EOS; one that does not fit goes on in the
    next row as a document of its own. The incomplete last row is left out.
    """

    def __init__(self, texts: Sequence[str], tokenizer, sequence_length: int, seed: int | None = None):
        order = list(range(len(texts)))
        if seed is not None:
            random.Random(seed).shuffle(order)
        stream, documents = [], []
        for number, ids in enumerate(tokenizer([texts[i] for i in order])["input_ids"]):
            if ids[-1] != tokenizer.eos_token_id:
                ids = [*ids, tokenizer.eos_token_id]
            stream.extend(ids)
            documents.extend([number] * len(ids))
        rows = len(stream) // sequence_length
        if rows == 0:
            raise ValueError(
                f"the data holds {len(stream)} tokens, fewer than one row of sequence_length {sequence_length}"
            )
        shape = (rows, sequence_length)
        self.tokens = torch.tensor(stream[: rows * sequence_length], dtype=torch.int32).view(shape)
        self.documents = torch.tensor(documents[: rows * sequence_length], dtype=torch.int32).view(shape)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index].long(), "document_ids": self.documents[index].long()}
