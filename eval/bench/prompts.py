"""Held-out prompts: of the embedded model's two domains, or those of a file."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from decoding.inputs.jsonl import read_jsonl
from eval.additions import Addition, additions
from eval.python_source import library_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PromptSet:
    """Prompts as token ids, and how many new tokens to decode. ``problems`` judges the answers, where there are any."""

    name: str
    ids: list[list[int]]
    max_new_tokens: int
    problems: list[Addition] | None = None

    def check(self, model: "PreTrainedModel") -> None:
        """Raise ValueError if a prompt and its answer do not fit into the context of ``model``."""
        from decoding.forward.rope import context_length  # names of sets are checked without torch

        context, longest = context_length(model.config), max(map(len, self.ids))
        if context is not None and longest + self.max_new_tokens > context:
            raise ValueError(
                f"prompts {self.name!r} have up to {longest} tokens and {self.max_new_tokens} more to be decoded, which do not "
                f"fit into the model's context of {context}"
            )

    def correct(self, index: int, completion: str) -> bool | None:
        """Whether an answer is right; None where nobody can say."""
        return None if self.problems is None else self.problems[index].is_answered_by(completion)


def worked_additions(tokenizer, count: int, seed: int = 1) -> PromptSet:
    """Held-out addition problems of 2 to 4 digits, to be solved step by step."""
    problems = list(itertools.islice(additions(seed=seed, held_out=True), count))
    ids = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    return PromptSet("additions", ids, max_new_tokens=224, problems=problems)


def held_out_python(tokenizer, count: int, prompt_tokens: int = 48, max_new_tokens: int = 96) -> PromptSet:
    """The first tokens of pieces of held-out standard-library files, spread over all of them."""
    encoded = [tokenizer(piece)["input_ids"] for piece in library_pieces(held_out=True)]
    long_enough = [ids[:prompt_tokens] for ids in encoded if len(ids) > prompt_tokens]
    if count > len(long_enough):  # more prompts than pieces: go on inside the pieces
        later = (
            ids[i : i + prompt_tokens] for ids in encoded for i in range(prompt_tokens, len(ids) - prompt_tokens, 97)
        )
        long_enough += list(itertools.islice(later, count - len(long_enough)))
    step = max(1, len(long_enough) // count)
    return PromptSet("python", long_enough[::step][:count], max_new_tokens)


def prompts_of_a_file(
    tokenizer, path: Path, count: int, chat: bool = False, prompt_tokens: int = 16, max_new_tokens: int = 96
) -> PromptSet:
    """Of each record of a JSONL file the ``messages``, to be answered, or the first tokens of its ``text``, to go on.

    chat: a ``text`` is a turn of the user, to be answered. Raises ValueError for a line with neither, if the tokenizer has no
    chat template for what is to be answered, and if all texts are short.
    """
    ids = []
    for number, record in read_jsonl("prompts", path):
        if len(ids) == count:
            break
        place = f"prompts: line {number} of {str(path)!r}"
        fields = record if isinstance(record, dict) else {}
        messages, text = fields.get("messages"), fields.get("text")
        if isinstance(text, str) and chat:
            messages = [{"role": "user", "content": text}]
        if messages is not None:
            ids.append(_turns(tokenizer, messages, place))
        elif isinstance(text, str):
            begun = tokenizer(text)["input_ids"]
            ids += [begun[:prompt_tokens]] if len(begun) > prompt_tokens else []
        else:
            raise ValueError(f"{place} must be a JSON object with a text in the field 'text', or turns in 'messages'")
    if not ids:
        raise ValueError(f"prompts: no text in {str(path)!r} has more than {prompt_tokens} tokens, so none can go on")
    return PromptSet(path.stem, ids, max_new_tokens)


def _turns(tokenizer, messages, place: str) -> list[int]:
    """Tokens of a conversation up to the next answer; raises ValueError where it cannot be shown."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{place} is to be answered, and the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program
        raise ValueError(
            f"{place} has 'messages' that the chat template cannot show: {' '.join(str(error).split())}"
        ) from error


PROMPT_SETS = {"additions": worked_additions, "python": held_out_python}


def check_prompts(name: str) -> None:
    """Raise ValueError if ``name`` is neither a set of ours nor a file."""
    if name not in PROMPT_SETS and not Path(name).is_file():
        raise ValueError(f"prompts must be {', '.join(PROMPT_SETS)} or a JSONL file that exists, got {name!r}")


def prompt_set(name: str, tokenizer, count: int, chat: bool = False, max_new_tokens: int | None = None) -> PromptSet:
    """The set called ``name``, or what is in the JSONL file ``name``; ValueError if it is neither.

    chat: as in :func:`prompts_of_a_file`. max_new_tokens: other than the set's own.
    """
    check_prompts(name)
    if name in PROMPT_SETS:
        chosen = PROMPT_SETS[name](tokenizer, count)
    else:
        chosen = prompts_of_a_file(tokenizer, Path(name), count, chat)
    return chosen if max_new_tokens is None else replace(chosen, max_new_tokens=max_new_tokens)
