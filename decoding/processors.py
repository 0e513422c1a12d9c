"""Logits processors that keep a state: found out before the model runs, and followed through drafts that are rejected.

``generate`` asks a processor once for each token of the text. A decoder that drafts asks it about text that may never be:
what was said of rejected drafts must be forgotten. So every sequence has a copy of each such processor, which goes on from
the copy that saw the last committed token.

Grammars of other libraries hold matchers that are no Python objects. They are copied by a method of their own, and what
never changes is shared.
"""

import copy
import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PrefixConstrainedLogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

# The methods by which objects copy themselves, state and all: xgrammar's matchers, llguidance's.
COPYING_METHODS = ("fork", "deep_copy")
# Parts that never change once they are made, many of which cannot be copied.
SHARED = (
    "xgrammar.compiler.CompiledGrammar",
    "outlines_core.Index",
    "builtins.LLTokenizer",
)
LARGE = (ModuleType, PreTrainedModel, PreTrainedTokenizerBase)  # shared as well; what they hold is no state of a text
PLAIN = (int, float, str, bytes, list, dict, set, tuple, Tensor)  # what a state outside of an object is made of


def is_foreign(processor: Any) -> bool:
    """Whether it is none of transformers' own, whose answers are known to depend on their arguments alone."""
    return not type(processor).__module__.startswith("transformers.")


def may_refuse_text(processor: Any) -> bool:
    """Whether it may raise when it is asked about a text that it would not have let come about."""
    return is_foreign(processor) or isinstance(processor, PrefixConstrainedLogitsProcessor)


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
    """A copy with a state of its own: by its method ``fork``, if it has one, else a deep copy.

    Parts that copy themselves do so; parts in SHARED, modules and functions stay the same ones.
    """
    own = _copied_by_itself(processor)
    if own is not None:
        return own
    known: dict[int, Any] = {}
    for part in _parts(processor, set()):
        own = part if _is_shared(part) else _copied_by_itself(part)
        if own is not None:
            known[id(part)] = own
    return copy.deepcopy(processor, known)


def can_be_copied(processor: Any, vocab_size: int, batch_size: int = 1) -> bool:
    """Whether a copy has a state of its own, that of one text; functions, and what holds something outside, have none.

    Tried before and after a first answer: many make their state only then. What is kept in a class, a module or a
    generator of random numbers shows in that copies do not answer alike.
    """
    ids = torch.arange(batch_size)[:, None] % vocab_size
    try:
        trial, other = copied(processor), copied(processor)
        if trial is processor:
            return False
        outside = _outside(processor)
    except Exception:
        return False
    try:
        scores = torch.zeros(batch_size, vocab_size)
        alike = torch.equal(trial(ids.clone(), scores.clone()), other(ids.clone(), scores))
    except Exception:  # not a text that it answers
        return True
    if not alike or _outside(processor) != outside:
        return False
    try:
        return copied(trial) is not trial
    except Exception:
        return False


def looks_at_other_rows(processor: Any, vocab_size: int, batch_size: int) -> bool:
    """Whether its answers on a text depend on the texts beside it, tried on copies; not if that cannot be tried.

    A text whose drafts are verified is shown in every place of the batch, since the others are at other tokens.
    """
    places = {0, batch_size - 1}
    ids = (torch.arange(batch_size)[:, None] + torch.arange(3)) % vocab_size
    try:
        if batch_size == 1 or for_one_place(processor, 0, batch_size) is not None:
            return False
        whole, alone = copied(processor), {place: copied(processor) for place in places}
        for step in range(1, ids.shape[1] + 1):
            scores = (torch.arange(vocab_size) * 7 + torch.arange(batch_size)[:, None] * 13 + step) % 31.0
            together = whole(ids[:, :step].clone(), scores.clone())
            for place in places:
                if not torch.equal(
                    ask(alone[place], ids[place, :step], scores[place], place, batch_size), together[place]
                ):
                    return True
    except Exception:  # not a text that it answers
        return False
    return False


def for_one_place(processor: Any, index: int, batch_size: int) -> Any:
    """``processor`` as it is for place ``index`` of a batch, to be shown that row alone; None where it needs a whole batch.

    A grammar of its own for each place would refuse the texts of the others.
    """
    for kind in type(processor).__mro__:
        make = ONE_PLACE.get(_full_name(kind))
        if make is not None:
            return make(processor, index, batch_size)
    return None


def _allowed_at_one_place(processor: PrefixConstrainedLogitsProcessor, index: int, batch_size: int) -> LogitsProcessor:
    allowed = processor._prefix_allowed_tokens_fn
    return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(index, text), 1)


def _xgrammar_at_one_place(processor: Any, index: int, batch_size: int) -> Any:
    grammars = processor.compiled_grammars
    if processor.matchers or len(grammars) not in (1, batch_size):
        return None
    own = copy.copy(processor)
    own.compiled_grammars, own.matchers = [grammars[index % len(grammars)]], []
    return own


def _outlines_at_one_place(processor: Any, index: int, batch_size: int) -> Any:
    return processor if getattr(processor, "is_first_token", False) else None


# By the full name of the class, so that nothing need be installed.
ONE_PLACE: dict[str, Callable[[Any, int, int], Any]] = {
    "transformers.generation.logits_process.PrefixConstrainedLogitsProcessor": _allowed_at_one_place,
    "xgrammar.contrib.hf.LogitsProcessor": _xgrammar_at_one_place,
    "outlines.processors.base_logits_processor.OutlinesLogitsProcessor": _outlines_at_one_place,
}


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """What ``value`` holds, and what that holds in turn; not beyond what is shared or copies itself."""
    if isinstance(value, dict):
        held = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        held = list(value)
    else:
        held = list(getattr(value, "__dict__", {}).values())
    for part in held:
        if id(part) in seen or isinstance(part, (str, int, float, type, Tensor)):
            continue
        seen.add(id(part))
        yield part
        if not _is_shared(part) and not _copies_itself(part):
            yield from _parts(part, seen)


def _is_shared(part: Any) -> bool:
    return isinstance(part, (*LARGE, FunctionType)) or _full_name(type(part)) in SHARED


def _copies_itself(part: Any) -> bool:
    return any(callable(getattr(part, name, None)) for name in COPYING_METHODS)


def _copied_by_itself(part: Any) -> Any:
    for name in COPYING_METHODS:
        method = getattr(part, name, None)
        if callable(method):
            return method()
    return None


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Snapshot(pickle.Pickler):
    """What an object holds, in bytes; of LARGE ones only which they are."""

    def persistent_id(self, value: Any) -> int | None:
        return id(value) if isinstance(value, LARGE) else None


def _snapshot(value: Any) -> bytes:
    file = io.BytesIO()
    _Snapshot(file).dump(value)
    return file.getvalue()


def _state(processor: Any) -> tuple[bytes, list[bytes]]:
    """What it holds: attributes of an object, enclosed variables of a function; and what is outside of it."""
    cells = getattr(processor, "__closure__", None) or ()
    held = getattr(processor, "__dict__", None), [cell.cell_contents for cell in cells]
    return _snapshot(held), _outside(processor)


def _outside(processor: Any) -> list[bytes]:
    """What no copy of it holds: plain values of its class, and defaults and global variables of the function that answers."""
    answers = processor if isinstance(processor, FunctionType | MethodType) else type(processor).__call__
    function = getattr(answers, "__func__", answers)
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    variables = getattr(function, "__globals__", {})
    values = chain(
        (variables[name] for name in names if name in variables),
        getattr(function, "__defaults__", None) or (),
        (getattr(function, "__kwdefaults__", None) or {}).values(),
        (value for kind in type(processor).__mro__ for name, value in vars(kind).items() if not name.startswith("__")),
    )
    return [_snapshot(value) for value in values if isinstance(value, PLAIN)]


class ProcessorCopies:
    """One copy of a processor for each sequence, as it was after the sequence's last committed token."""

    def __init__(self, processor: LogitsProcessor):
        self._processor = processor
        self._committed: dict[int, LogitsProcessor] = {}
        self._alone: dict[int, bool] = {}
        self._asked: dict[int, list[LogitsProcessor]] = defaultdict(list)

    def __call__(self, index: int, ids: Tensor, scores: Tensor, batch_size: int) -> Tensor:
        """Its answer [V] for the next row of sequence ``index``: the next token, then what follows each draft in turn.

        ids: [L]. scores: [V].
        """
        if index not in self._committed:
            alone = for_one_place(self._processor, index, batch_size)
            self._committed[index], self._alone[index] = alone or self._processor, alone is not None
        before = self._asked[index][-1] if self._asked[index] else self._committed[index]
        asked = copied(before)
        answer = ask(asked, ids, scores, *(0, 1) if self._alone[index] else (index, batch_size))
        self._asked[index].append(asked)
        return answer

    def commit(self, index: int, count: int) -> None:
        """The first ``count`` rows became tokens; what was said of the others is forgotten.

        Behind the end of a text nothing was asked, though there may be rows.
        """
        if self._asked[index]:
            self._committed[index] = self._asked.pop(index)[:count][-1]


def ask(processor: Any, ids: Tensor, scores: Tensor, index: int, batch_size: int) -> Tensor:
    """The answer [V] of ``processor`` about the text ``ids`` [L] and its ``scores`` [V], shown in place ``index`` of a batch.

    Some hold values for each place of the batch they were made for; some write into what they are given.
    """
    return processor(ids.repeat(batch_size, 1), scores.repeat(batch_size, 1))[index]
