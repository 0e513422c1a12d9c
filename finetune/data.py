"""From sources to documents: mixed by weight, in an order that a seed decides, held whole or streamed."""

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice

import datasets
import numpy as np
from datasets import Dataset

from finetune.documents import Document, Encoder
from finetune.sources import Source, read_records, stream_records

ALL_HELD_OUT = "held_out: all documents of data are held out, so nothing is left to train on"
BATCH = 1000  # records that are encoded at once
FEATURES = datasets.Features(
    input_ids=datasets.Sequence(datasets.Value("int32")),
    loss_mask=datasets.Sequence(datasets.Value("bool")),
    digest=datasets.Value("string"),
    record=datasets.Value("int64"),
)


def load_documents(sources: Iterable[Source], tokenizer, seed: int | None = None) -> Dataset:
    """The documents of all sources, in an order that ``seed`` alone decides; without one, in the order of the files.

    Columns: "input_ids" and "loss_mask", the tokens and which of them are to be learned; "digest", the same for documents of
    the same text; "record", a number for the record that a document is of. Raises ValueError for a file that cannot be read
    or holds no record, and for a record that makes no document.
    """
    parts, count = [], 0
    for source in sources:
        encode, tables = Encoder(tokenizer, source.eos), []
        for records in _batches(read_records(source)):
            rows = [row for number, row in enumerate(encode(records), count) for row in _rows(row, number)]
            tables.append(Dataset.from_list(rows, features=FEATURES))
            count += len(records)
        if not tables:
            raise ValueError(f"data: {source.path!r} holds no record")
        encoded = datasets.concatenate_datasets(tables)
        parts.append(encoded.select(_repeated(len(encoded), source.weight, seed or 0)))
    documents = datasets.concatenate_datasets(parts)
    order = list(range(len(documents)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return documents.select(order)


def stream_documents(
    sources: Iterable[Source], tokenizer, seed: int, without: Collection[str] = ()
) -> "DocumentStream":
    """The documents of all sources, {"input_ids", "loss_mask", "digest"}, read while they are used and mixed by their weights.

    Records that give a document with one of the digests ``without`` are left out. Raises ValueError as load_documents.
    """
    return DocumentStream(list(sources), tokenizer, seed, frozenset(without))


class DocumentStream:
    """One epoch at each iteration, whose order ``seed`` and the epoch (:meth:`set_epoch`) decide.

    An epoch ends when every source has come to its end; one that comes to it sooner starts again, in
    another order.
    """

    def __init__(self, sources: list[Source], tokenizer, seed: int, without: frozenset[str]):
        self.sources, self.tokenizer, self.seed, self.without = sources, tokenizer, seed, without
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        numbers, weights = range(len(self.sources)), [source.weight for source in self.sources]
        draw = random.Random(f"{self.seed} {self.epoch}")
        running = [self._documents(number, 0) for number in numbers]
        starts, found = [0 for _ in numbers], False
        while True:
            (number,) = draw.choices(numbers, weights)
            document = next(running[number], None)
            if document is None:
                starts[number] += 1
                if all(starts):
                    if not found:
                        raise ValueError(ALL_HELD_OUT)
                    return
                running[number] = self._documents(number, starts[number])
                document = next(running[number], None)
            if document is None:
                weights[number] = 0
            else:
                found = True
                yield document

    def _documents(self, number: int, start: int) -> Iterator[dict]:
        """The documents of one source, shuffled; raises ValueError if it is empty."""
        source, empty = self.sources[number], True
        encode = Encoder(self.tokenizer, source.eos)
        order = np.random.default_rng([self.seed, self.epoch, number, start])
        for records in _batches(stream_records(source, order)):
            empty = False
            for documents in encode(records):
                if not any(document.digest in self.without for document in documents):
                    yield from map(vars, documents)
        if empty:
            raise ValueError(f"data: {source.path!r} holds no record")


def read_texts(paths: Iterable[str]) -> list[str]:
    """The ``text`` fields of data files; raises ValueError for one that has none."""
    texts = []
    for path in paths:
        for place, record in read_records(Source(str(path))):
            if not isinstance(record, Mapping) or not isinstance(record.get("text"), str):
                raise ValueError(f"data: {place} has no column 'text' with a text")
            texts.append(record["text"])
    return texts


def _rows(documents: Iterable[Document], number: int) -> list[dict]:
    return [{**vars(document), "record": number} for document in documents]


def _batches(records: Iterable) -> Iterator[list]:
    records = iter(records)
    while batch := list(islice(records, BATCH)):
        yield batch


def _repeated(count: int, weight: float, seed: int) -> list[int]:
    """Each of ``count`` indices ``weight`` times, the fraction by lot."""
    whole, part = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(count), round(part * count)) if part else []
    return [*(list(range(count)) * int(whole)), *sorted(drawn)]
