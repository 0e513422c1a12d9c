"""From files and hub data sets to documents: plain text, prompts with completions, and conversations."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset

from decoding.checks import check_range

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
SHUFFLE_BUFFER = 10_000  # documents of a stream among which the next one is drawn


@dataclass(frozen=True)
class Source:
    """One item of a recipe's ``data``.

    path: a .jsonl, .json, .parquet or .txt file (one document), or the name of a data set on the hub.
    name, split: configuration and split of a data set on the hub.
    weight: how often each of its documents comes in an epoch, 2 is twice and 0.5 is every second one; with streaming
        the share of its documents in the mixture is proportional to it.
    eos: whether plain texts and completions end with EOS; false for a model that never learned to end its texts. A
        record whose field ``complete`` is false, a text that was cut off, gets none in any case.
    """

    path: str
    name: str | None = None
    split: str = "train"
    weight: float = 1.0
    eos: bool = True

    def __post_init__(self):
        check_range("data.weight", self.weight, 0, include_low=False)

    @classmethod
    def of(cls, value: "str | Mapping") -> "Source":
        return cls(value) if isinstance(value, str) else cls(**value)


def load_documents(sources: Iterable[Source], tokenizer, seed: int | None = None) -> Dataset:
    """The documents of all sources, {"input_ids", "targets"}, in an order that ``seed`` alone decides.

    Without a seed they stay in the order of the files.
    """
    parts = []
    for source in sources:
        records = _read(source, streaming=False)
        encoded = records.map(
            _encoder(source, records.column_names, tokenizer),
            with_indices=True,
            batched=True,
            remove_columns=records.column_names,
            desc=None,
        )
        parts.append(encoded.select(_repeated(len(encoded), source.weight, seed or 0)))
    documents = datasets.concatenate_datasets(parts)
    order = list(range(len(documents)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return documents.select(order)


def stream_documents(sources: Iterable[Source], tokenizer, seed: int) -> IterableDataset:
    """The documents of all sources without an end to wait for, mixed by their weights."""
    parts, weights = [], []
    for source in sources:
        records = _read(source, streaming=True)
        columns = records.column_names or list(next(iter(records)))
        encode = _encoder(source, columns, tokenizer)
        parts.append(
            records.shuffle(seed, buffer_size=SHUFFLE_BUFFER).map(
                encode, with_indices=True, batched=True, batch_size=100, remove_columns=columns
            )
        )
        weights.append(source.weight)
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, shares, seed, stopping_strategy="all_exhausted")


def read_texts(paths: Iterable[str]) -> list[str]:
    """The ``text`` fields of data files; raises ValueError for one that has none."""
    texts = []
    for path in paths:
        records = _read(Source(str(path)), streaming=False)
        if "text" not in records.column_names:
            raise ValueError(f"data: {str(path)!r} has no column 'text'")
        texts += records["text"]
    return texts


def _read(source: Source, streaming: bool):
    path = Path(source.path).expanduser()
    kind = FORMATS.get(path.suffix)
    if kind is None and path.exists():
        raise ValueError(f"data: {source.path!r} must end in one of {', '.join(FORMATS)}")
    if kind is not None and not path.is_file():
        raise ValueError(f"data: the file {source.path!r} does not exist")
    try:
        if kind is None:
            return datasets.load_dataset(source.path, source.name, split=source.split, streaming=streaming)
        settings = {"sample_by": "document"} if kind == "text" else {}
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming, **settings)
    except Exception as error:  # every format and the hub have exceptions of their own
        cause = error.__cause__ or error
        raise ValueError(f"data: {source.path!r} cannot be read: {' '.join(str(cause).split())}") from error


def _repeated(count: int, weight: float, seed: int) -> list[int]:
    """Each of ``count`` indices ``weight`` times, the fraction by lot."""
    whole, part = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(count), round(part * count)) if part else []
    return [*(list(range(count)) * int(whole)), *sorted(drawn)]


def _encoder(source: Source, columns: list[str], tokenizer):
    """The function from a batch of records to documents that the columns of ``source`` ask for."""
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no EOS token, so nothing would tell the model where a document ends")
    kinds = {("messages",): _conversations, ("prompt", "completion"): _completions, ("text",): _texts}
    names = next((names for names in kinds if set(names) <= set(columns)), None)
    if names is None:
        raise ValueError(
            f"data: {source.path!r} needs a column 'text', or 'prompt' and 'completion', or 'messages'; "
            f"it has {', '.join(map(repr, sorted(columns)))}"
        )

    def batch(records: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        for name in names:
            for index, value in zip(indices, records[name], strict=True):
                if value is None:
                    raise ValueError(f"data: record {index + 1} of {source.path!r} has no {name!r}")
        complete = records.get("complete", [True] * len(indices))
        ended = [source.eos and whole is not False for whole in complete]
        documents = kinds[names](tokenizer, *(records[name] for name in names), ended)
        return {"input_ids": [ids for ids, _ in documents], "targets": [targets for _, targets in documents]}

    return batch


def _texts(tokenizer, texts: list[str], ended: list[bool]):
    """Plain text: all of it is learned. The tokenizer's special tokens frame it, and EOS ends it."""
    encoded = tokenizer(texts)["input_ids"]
    documents = [_ended(ids, tokenizer, end) for ids, end in zip(encoded, ended, strict=True)]
    return [(ids, [True] * len(ids)) for ids in documents]


def _completions(tokenizer, prompts: list[str], completions: list[str], ended: list[bool]):
    """A prompt and its completion are encoded apart, as in use; the completion and its EOS are learned."""
    documents = []
    given = tokenizer(prompts)["input_ids"]
    learned = tokenizer(completions, add_special_tokens=False)["input_ids"]
    for prompt, completion, end in zip(given, learned, ended, strict=True):
        prompt = _ended(prompt, tokenizer, False)
        completion = _ended(completion, tokenizer, end)
        documents.append(([*prompt, *completion], [False] * len(prompt) + [True] * len(completion)))
    return documents


def _conversations(tokenizer, conversations: list[list[Mapping]], ended: list[bool]):
    """Chats by the tokenizer's template: the assistant's turns are learned, from behind the generation prompt on."""
    if tokenizer.chat_template is None:
        raise ValueError("data: 'messages' need a tokenizer with a chat template")
    pairs = zip(conversations, ended, strict=True)
    return [document for messages, end in pairs for document in _conversation(tokenizer, messages, end)]


def _conversation(tokenizer, messages: list[Mapping], ended: bool):
    """One document, or several where the template shows earlier turns otherwise once later ones follow.

    Each turn is encoded apart from what stands before it, since in use the prompt's tokens are given.
    """
    documents, ids, targets, done = [], [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not ended and i == len(messages) - 1 and message["content"] in whole:
            whole = whole[: whole.rindex(message["content"]) + len(message["content"])]
        if not whole.startswith(prompt):  # such as a template that hides the thoughts of all turns but the last
            raise ValueError("data: the chat template does not put a turn right behind its generation prompt")
        if not prompt.startswith(done):
            documents.append((ids, targets))
            ids, targets, done = [], [], ""
        for text, learned in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
            new = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, targets = [*ids, *new], [*targets, *([learned] * len(new))]
        done = whole
    return [*documents, (ids, targets)] if ids else documents


def _ended(ids: list[int], tokenizer, end: bool) -> list[int]:
    """``ids`` with one EOS at the end or none, whatever the tokenizer put there."""
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return [*ids, tokenizer.eos_token_id] if end else ids
