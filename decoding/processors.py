"""Logits processors that keep a state: found out before the model runs, and followed through drafts that are rejected.

``generate`` asks a processor once for each token of the text. A decoder that drafts asks it about text that may never be:
what was said of rejected drafts must be forgotten. So every sequence has a copy of each such processor, which goes on from
the copy that saw the last committed token.
"""

import copy
import pickle
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


def is_foreign(processor: Any) -> bool:
    """Whether it is none of transformers' own, whose answers are known to depend on their arguments alone."""
    return not type(processor).__module__.startswith("transformers.")


def keeps_state(processor: Any, vocab_size: int) -> bool:
    """Whether answering changes what ``processor`` answers later, tried out on a copy; where none can be made, on itself."""
    ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, vocab_size)
    try:
        trial = copied(processor)
        before = _state(trial)
        answers = [trial(ids, scores.clone()) for _ in range(2)]
        return before != _state(trial) or not torch.equal(*answers)
    except Exception:  # it may raise whatever it likes; what cannot be tried is taken to have one
        return True


def copied(processor: LogitsProcessor) -> LogitsProcessor:
    """A copy with a state of its own: by its method ``fork``, if it has one, else a deep copy."""
    fork = getattr(processor, "fork", None)
    return fork() if callable(fork) else copy.deepcopy(processor)


def can_be_copied(processor: Any) -> bool:
    """Whether a copy has a state of its own; functions, and what holds something outside of Python, have none."""
    try:
        return copied(processor) is not processor
    except Exception:
        return False


def _state(processor: Any) -> bytes:
    """What it holds: attributes of an object, enclosed variables of a function."""
    cells = getattr(processor, "__closure__", None) or ()
    return pickle.dumps((getattr(processor, "__dict__", None), [cell.cell_contents for cell in cells]))


class ProcessorCopies:
    """One copy of a processor for each sequence, as it was after the sequence's last committed token."""

    def __init__(self, processor: LogitsProcessor):
        self._processor = processor
        self._committed: dict[int, LogitsProcessor] = {}
        self._asked: dict[int, list[LogitsProcessor]] = defaultdict(list)

    def __call__(self, index: int, ids: Tensor, scores: Tensor) -> Tensor:
        """Its answer for the next row of sequence ``index``: the next token, then what follows each draft in turn."""
        before = self._asked[index][-1] if self._asked[index] else self._committed.get(index, self._processor)
        asked = copied(before)
        answer = asked(ids, scores)
        self._asked[index].append(asked)
        return answer

    def commit(self, index: int, count: int) -> None:
        """The first ``count`` rows that it was asked about became tokens; the others are forgotten."""
        if self._asked[index]:
            self._committed[index] = self._asked.pop(index)[count - 1]
