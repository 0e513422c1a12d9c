"""From records to prompts: what a model is asked to continue or to answer, and what its answer is kept with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from decoding.inputs.jsonl import read_jsonl
from finetune.chat import check_messages, render, template_arguments
from finetune.documents import normal_form, text_of

KINDS = (("messages",), ("conversations",), ("prompt",), ("instruction",), ("text",))


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the fields of the record that they came from, as :func:`answered` takes them."""

    ids: list[int]
    record: dict


def read_prompts(path: str, prompt_tokens: int, tokenizer) -> Iterator[Prompt]:
    """The prompts of a JSONL file; raises ValueError for one that cannot be read, with its line and the field."""
    for number, record in read_jsonl("prompts", path):
        try:
            prompt = _prompt(record, prompt_tokens, tokenizer)
            if not prompt.ids:
                raise ValueError("has a prompt without a token")
        except ValueError as error:
            raise ValueError(f"prompts: line {number} of {path!r} {error}") from error
        yield prompt


def _prompt(record: Any, prompt_tokens: int, tokenizer) -> Prompt:
    """Raises ValueError with the rest of a sentence about the record."""
    if not isinstance(record, Mapping):
        raise ValueError(f"is {str(record)[:40]!r}, but must be an object with fields")
    names = next((names for names in KINDS if all(record.get(name) is not None for name in names)), None)
    if names is None:
        raise ValueError(
            "has neither 'messages' nor 'prompt' nor 'text', nor 'instruction' (alpaca), nor 'conversations' (sharegpt)"
        )
    record = normal_form(record, names, tokenizer)
    if "messages" in record:
        return _chat_prompt(record, tokenizer)
    if "prompt" in record:
        prompt = text_of(record, "prompt")
        return Prompt(_without_eos(tokenizer(prompt)["input_ids"], tokenizer), {"prompt": prompt})
    return Prompt(_without_eos(tokenizer(text_of(record, "text"))["input_ids"], tokenizer)[:prompt_tokens], {})


def _chat_prompt(record: Mapping, tokenizer) -> Prompt:
    """The conversation up to the last turn of the user, and behind it the generation prompt."""
    if tokenizer.chat_template is None:
        raise ValueError("has 'messages', which need a tokenizer with a chat template")
    check_messages(record["messages"])
    asked = [i for i, message in enumerate(record["messages"], 1) if message["role"] == "user"]
    if not asked:
        raise ValueError("has no turn of the role 'user' in 'messages'")
    messages, arguments = record["messages"][: asked[-1]], template_arguments(record, tokenizer)
    text = render(tokenizer, messages, arguments, add_generation_prompt=True)
    return Prompt(tokenizer(text, add_special_tokens=False)["input_ids"], {"messages": messages, **arguments})


def answered(prompt: Prompt, ids: list[int], tokenizer) -> dict:
    """The record of ``prompt`` with its continuation ``ids``, in the form that a recipe's ``data`` takes."""
    complete = {"complete": bool(ids) and ids[-1] == tokenizer.eos_token_id}
    # Decoded together and cut: some tokenizers show the first token of a text without its space.
    given = tokenizer.decode(prompt.ids, skip_special_tokens=True)
    completion = tokenizer.decode([*prompt.ids, *ids], skip_special_tokens=True)[len(given) :]
    if "messages" in prompt.record:
        messages = [*prompt.record["messages"], {"role": "assistant", "content": completion}]
        return {**prompt.record, "messages": messages, **complete}
    if "prompt" in prompt.record:
        return {**prompt.record, "completion": completion, **complete}
    return {"text": given + completion, **complete}


def _without_eos(ids: list[int], tokenizer) -> list[int]:
    """Some tokenizers end every text with EOS, behind which there is nothing to say."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
