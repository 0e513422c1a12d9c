"""From records to documents: plain text, prompts with completions, and conversations."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.chat import check_messages, from_sharegpt, render, template_arguments

# The columns of each kind of record, what says more before what says less.
KINDS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
COLUMNS = (
    "'text', or 'prompt' and 'completion', or 'messages', or those of alpaca ('instruction' and 'output', perhaps "
    "'input') or sharegpt ('conversations')"
)


@dataclass(frozen=True)
class Document:
    """input_ids: int32 [n]. loss_mask: bool [n], the tokens to be learned. digest: the same for documents of the same text."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    digest: str


@dataclass(frozen=True)
class Part:
    """A stretch of a document that is encoded apart from the others.

    framed: the tokenizer puts its special tokens around it; but an EOS stands only at the end of a document.
    """

    text: str
    learned: bool
    framed: bool = False


@dataclass(frozen=True)
class Draft:
    """The parts of a document. ended: whether an EOS ends it; None leaves that to the chat template."""

    parts: list[Part]
    ended: bool | None = None


class Encoder:
    """The function from records of one source to the documents of each.

    text: all of it is learned. The tokenizer's special tokens frame it, and EOS ends it.
    prompt, completion: encoded apart, as in use; the completion and its EOS are learned.
    messages: by the tokenizer's chat template, which gets every other field that it asks for, such as ``tools``; the turns
        of the assistant are learned, from behind the generation prompt on.
    conversations, and perhaps system (sharegpt): turns with ``from`` (human, gpt, system or observation) and ``value``; as
        messages.
    instruction, output, and perhaps input and system (alpaca): a user's turn and the assistant's where the tokenizer has
        a chat template, else a prompt, with an empty line behind each of its parts, and its completion.
    complete: where it is false, the text was cut off, and no EOS ends it.

    Raises ValueError for a record that is none of these, with its place and the field.
    """

    def __init__(self, tokenizer, eos: bool):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no EOS token, so nothing would tell the model where a document ends")
        self.tokenizer, self.eos = tokenizer, eos
        self._names: tuple[str, ...] | None = None  # of the last record

    def __call__(self, records: Iterable[tuple[str, Any]]) -> list[list[Document]]:
        """The documents of each of ``records``: pairs of a place, for messages, and what stands there."""
        drafts = [self._named_drafts(place, record) for place, record in records]
        encoded = self._encode({part for documents in drafts for draft in documents for part in draft.parts})
        return [[self._document(draft, encoded) for draft in documents] for documents in drafts]

    def _named_drafts(self, place: str, record: Any) -> list[Draft]:
        try:
            return self._drafts(record)
        except ValueError as error:
            raise ValueError(f"data: {place} {error}") from error

    def _drafts(self, record: Any) -> list[Draft]:
        self._names = kind_of(record, KINDS, self._names)
        record = normal_form(record, self._names, self.tokenizer)
        ended = self.eos and record.get("complete") is not False
        if "messages" in record:
            return conversation(record, self.tokenizer, ended)
        if "prompt" in record:
            prompt, completion = (text_of(record, name) for name in ("prompt", "completion"))
            return [Draft([Part(prompt, False, framed=True), Part(completion, True)], ended)]
        return [Draft([Part(text_of(record, "text"), True, framed=True)], ended)]

    def _encode(self, parts: set[Part]) -> dict[Part, list[int]]:
        encoded = {}
        for framed in (False, True):
            some = [part for part in parts if part.framed == framed]
            if some:
                ids = self.tokenizer([part.text for part in some], add_special_tokens=framed)["input_ids"]
                encoded |= zip(some, ids, strict=True)
        return encoded

    def _document(self, draft: Draft, encoded: Mapping[Part, list[int]]) -> Document:
        ids, counts, eos = [], [], self.tokenizer.eos_token_id
        for part in draft.parts:
            new = encoded[part]
            if draft.ended is not None and new and new[-1] == eos:
                new = new[:-1]
            ids += new
            counts.append(len(new))
        if draft.ended:
            ids.append(eos)
            counts[-1] += 1
        loss_mask = np.repeat([part.learned for part in draft.parts], counts)
        text = "".join(part.text for part in draft.parts).strip()
        return Document(np.array(ids, np.int32), loss_mask, hashlib.sha256(text.encode()).hexdigest())


def kind_of(record: Any, kinds: Iterable[tuple[str, ...]], before: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The first of ``kinds`` whose columns ``record`` has; a column that is null is none.

    Raises ValueError, with the rest of a sentence about the record: what misses to the kind of the record ``before``.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"is {str(record)[:40]!r}, but must be an object with columns {COLUMNS}")
    given = {name for name, value in record.items() if value is not None}
    for names in kinds:
        if given.issuperset(names):
            return names
    wanted = next((names for names in kinds if record.keys() >= set(names)), before)
    if wanted is not None:
        raise ValueError(f"has no {next(name for name in wanted if name not in given)!r}")
    raise ValueError(f"needs a column {COLUMNS}; it has {', '.join(map(repr, sorted(record))) or 'none'}")


def normal_form(record: Mapping, names: tuple[str, ...], tokenizer) -> Mapping:
    """``record``, of the kind ``names``, with "messages", "prompt" and perhaps "completion", or "text", and no two of them.

    Raises ValueError, with the rest of a sentence about the record, for a field of the wrong type.
    """
    others = {name: value for name, value in record.items() if not any(name in kind for kind in KINDS)}
    if "conversations" in names:
        return {**others, "messages": from_sharegpt(record)}
    if "instruction" in names:
        told = [text_of(record, name) for name in ("system", "instruction", "input") if record.get(name)]
        answer = [text_of(record, "output")] if "output" in names else []
        if tokenizer.chat_template is None:
            prompt = {"prompt": "".join(f"{text}\n\n" for text in told)}
            return {**others, **prompt, **({"completion": answer[0]} if answer else {})}
        system = [{"role": "system", "content": told.pop(0)}] if record.get("system") else []
        asked = [{"role": "user", "content": "\n\n".join(told)}]
        return {**others, "messages": [*system, *asked, *({"role": "assistant", "content": text} for text in answer)]}
    return {**others, **{name: record[name] for name in names}}


def text_of(record: Mapping, name: str) -> str:
    """The text in the field ``name``; raises ValueError, with the rest of a sentence about the record, if it is none."""
    text = record[name]
    if not isinstance(text, str):
        raise ValueError(f"has {str(text)[:40]!r} ({type(text).__name__}) in {name!r}, which must be a text")
    _check_characters(text, name)
    return text


def conversation(record: Mapping, tokenizer, ended: bool) -> list[Draft]:
    """One document, or several where the template shows earlier turns otherwise once later ones follow.

    Each turn is encoded apart from what stands before it, since in use the prompt's tokens are given. Raises ValueError,
    with the rest of a sentence about the record, for turns that cannot be shown or learned.
    """
    if tokenizer.chat_template is None:
        raise ValueError("has 'messages', which need a tokenizer with a chat template")
    messages = record["messages"]
    check_messages(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no turn of the role 'assistant' in 'messages', so nothing to learn")
    if messages[0]["role"] == "assistant":
        raise ValueError("has a turn of the role 'assistant' at the start of 'messages', before anything was asked")
    arguments = template_arguments(record, tokenizer)
    drafts, parts, done = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:i], arguments, add_generation_prompt=True)
        whole = render(tokenizer, messages[: i + 1], arguments, add_generation_prompt=False)
        said = message.get("content")
        if not ended and i == len(messages) - 1 and isinstance(said, str) and said in whole:
            whole = whole[: whole.rindex(said) + len(said)]
        if not whole.startswith(prompt):  # such as a template that hides the thoughts of all turns but the last
            raise ValueError(
                f"has 'messages[{i}]', which the chat template does not put right behind its generation prompt"
            )
        _check_characters(whole, "messages")
        if not prompt.startswith(done):
            drafts.append(Draft(parts))
            parts, done = [], ""
        parts = [*parts, Part(prompt[len(done) :], False), Part(whole[len(prompt) :], True)]
        done = whole
    return [*drafts, Draft(parts)]


def _check_characters(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"has half a character ({ascii(text[error.start])}) in {name!r}") from None
