"""Where training data comes from: files and hub data sets, read record by record."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from decoding.inputs.checks import check_range
from decoding.inputs.hub import hub_or_cache
from decoding.inputs.jsonl import BOM, parse, read_jsonl

FORMATS = (".jsonl", ".json", ".parquet", ".txt")
# Other names of files, so that nobody waits for the hub to deny that it has a data set of that name.
FILES = (".csv", ".tsv", ".gz", ".zst", ".zip", ".bz2", ".xz", ".tar", ".arrow", ".ndjson", ".md", ".yaml", ".xml")
SHUFFLE_BUFFER = 10_000  # records of a stream among which the next one is drawn


@dataclass(frozen=True)
class Source:
    """One item of a recipe's ``data``.

    path: a .jsonl, .json, .parquet or .txt file (one document), or the name of a data set on the hub.
    name, split: configuration and split of a data set on the hub.
    weight: how often each of its documents comes in an epoch, 2 is twice and 0.5 is every second one; with streaming
        the share of its documents in the mixture is proportional to it.
    eos: whether plain texts and completions end with EOS; false for a model that never learned to end its texts. A
        record whose field ``complete`` is false, a text that was cut off, gets none in any case.

    What a record may look like is in ``finetune.documents.Encoder``.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    eos: bool = True

    def __post_init__(self):
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"data.path must be a file or the name of a data set, got {self.path!r}")
        check_range("data.weight", self.weight, 0, include_low=False, include_high=False)

    @property
    def place(self) -> tuple:
        """Where the records come from: the same for sources of the same records."""
        return str(Path(self.path).expanduser().resolve()), self.name, self.split


def reported_names(sources: list[Source]) -> dict[str, Source]:
    """Each source by the stem of its file; a second one of the same stem gets a number."""
    named = {}
    for source in sources:
        stem = name = Path(source.path).stem.replace("-", "_")
        count = 1
        while name in named:
            count += 1
            name = f"{stem}_{count}"
        named[name] = source
    return named


def read_records(source: Source) -> Iterator[tuple[str, Any]]:
    """Each record of ``source`` with its place, for messages; raises ValueError for what cannot be read."""
    kind = _format_of(source)
    if kind == ".jsonl":
        for count, (line, record) in enumerate(read_jsonl("data", Path(source.path).expanduser()), 1):
            yield f"line {line}, record {count} of {source.path!r}", record
        return
    readers = {".json": _json, ".parquet": _parquet, ".txt": _text, None: _hub}
    for count, record in enumerate(readers[kind](source), 1):
        yield f"record {count} of {source.path!r}", record


def stream_records(source: Source, order: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """The same in another order, nearly at random, without a copy of the whole source."""
    if _format_of(source) is None:
        records = _hub(source, order)
        yield from ((f"shuffled record {count} of {source.path!r}", record) for count, record in enumerate(records, 1))
        return
    pairs = IterableDataset.from_generator(_as_columns, gen_kwargs={"source": source})
    for pair in pairs.shuffle(generator=order, buffer_size=SHUFFLE_BUFFER):
        yield pair["place"], pair["record"]


def _as_columns(source: Source) -> Iterator[dict]:
    for place, record in read_records(source):
        yield {"place": place, "record": record}


def _format_of(source: Source) -> str | None:
    """The suffix of a file, None for a data set on the hub; raises ValueError for what can be neither."""
    path = Path(source.path).expanduser()
    kind, owner, slashes = path.suffix.lower(), source.path.partition("/")[0], source.path.count("/")
    if path.is_dir():
        raise ValueError(f"data: {source.path!r} is a folder; name files that end in one of {', '.join(FORMATS)}")
    if path.exists() and kind not in FORMATS:
        raise ValueError(f"data: {source.path!r} must end in one of {', '.join(FORMATS)}")
    is_path = kind in (*FORMATS, *FILES) or source.path.startswith((".", "~", "/")) or slashes > 1
    if not path.exists() and (is_path or slashes and Path(owner).is_dir()):
        raise ValueError(f"data: the file {source.path!r} does not exist")
    return kind if path.exists() else None


def _json(source: Source) -> Iterable[Any]:
    """The records of a list, or of JSON lines under this name."""
    data = _bytes(source)
    if not data.strip():
        return []
    try:
        value = parse(data)
    except ValueError as error:
        lines = data.strip().split(b"\n")
        if len(lines) > 1 and lines[0].rstrip().endswith(b"}"):
            return (record for _, record in read_jsonl("data", Path(source.path).expanduser()))
        raise _unreadable(source, f"it {error}") from None
    return value if isinstance(value, list) else [value]


def _text(source: Source) -> Iterable[dict]:
    """The whole file as one record."""
    data = _bytes(source)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _unreadable(source, f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x})") from None
    return [{"text": text.replace("\r\n", "\n").replace("\r", "\n")}] if text.strip() else []


def _bytes(source: Source) -> bytes:
    try:
        return Path(source.path).expanduser().read_bytes().removeprefix(BOM)
    except OSError as error:
        raise _unreadable(source, error.strerror) from None


def _parquet(source: Source) -> Iterator[dict]:
    try:
        with ParquetFile(Path(source.path).expanduser()) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from map(_told, batch.to_pylist())
    except (ArrowException, OSError) as error:
        raise _unreadable(source, error) from None


def _hub(source: Source, order: np.random.Generator | None = None) -> Iterator[dict]:
    """The records of a data set on the hub, streamed in another order if ``order`` is given."""
    streaming = order is not None
    try:
        with hub_or_cache():
            table = datasets.load_dataset(source.path, source.name, split=source.split, streaming=streaming)
    except Exception as error:  # the hub has many exceptions of its own
        raise _unreadable(source, error.__cause__ or error) from error
    return map(_told, table.shuffle(generator=order, buffer_size=SHUFFLE_BUFFER) if streaming else table)


def _unreadable(source: Source, reason: Any) -> ValueError:
    return ValueError(f"data: {source.path!r} cannot be read: {' '.join(str(reason).split())}")


def _told(record: dict) -> dict:
    """``record`` without what only others have inside their fields, such as tool calls, which tables fill with null."""
    return {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
