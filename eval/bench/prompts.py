"""Held-out prompts of the embedded model's two domains."""

import itertools
from dataclasses import dataclass
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


def texts_of_a_file(tokenizer, path: Path, count: int, prompt_tokens: int = 16, max_new_tokens: int = 96) -> PromptSet:
    """The first tokens of the ``text`` fields of a JSONL file; ValueError for a line without one, or if all are short."""
    texts = []
    for number, record in read_jsonl("prompts", path):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(
                f"prompts: line {number} of {str(path)!r} must be a JSON object with a text in the field 'text'"
            )
        texts.append(record["text"])
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    ids = [ids[:prompt_tokens] for ids in encoded if len(ids) > prompt_tokens][:count]
    if not ids:
        raise ValueError(f"prompts: no text in {str(path)!r} has more than {prompt_tokens} tokens, so none can go on")
    return PromptSet(path.stem, ids, max_new_tokens)


PROMPT_SETS = {"additions": worked_additions, "python": held_out_python}


def check_prompts(name: str) -> None:
    """Raise ValueError if ``name`` is neither a set of ours nor a file."""
    if name not in PROMPT_SETS and not Path(name).is_file():
        raise ValueError(f"prompts must be {', '.join(PROMPT_SETS)} or a JSONL file that exists, got {name!r}")


def prompt_set(name: str, tokenizer, count: int) -> PromptSet:
    """The set called ``name``, or the texts of the JSONL file ``name``; ValueError if it is neither."""
    check_prompts(name)
    if name in PROMPT_SETS:
        return PROMPT_SETS[name](tokenizer, count)
    return texts_of_a_file(tokenizer, Path(name), count)
