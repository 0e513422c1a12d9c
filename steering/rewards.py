"""What a reward is: a function that judges a batch of texts, asked for what its parameters name.

A reward returns N numbers, in nats: a text x is wanted exp(reward(x)) times as much as without it; -inf rules it out. It
may have these parameters, each a list with an entry for each text (the first two as in TRL's reward functions):

    prompts, completions: texts, special tokens left out.
    prompt_ids, completion_ids: token ids; a completion's include its EOS.
    finished: whether nothing follows. Only a function that has this parameter is asked about unfinished texts, too; -inf
        for one of those must mean that no continuation is possible.
"""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from decoding.batch import RunError
from decoding.inputs.checks import named_object
from steering.classifier import ClassifierReward

TEXTS = ("prompts", "completions")
IDS = ("prompt_ids", "completion_ids")
FINISHED = "finished"
ARGUMENTS = (*TEXTS, *IDS, FINISHED)
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")  # module:name, while a model is a folder or OWNER/NAME


class RewardError(RunError):
    """A reward failed. ``output`` is a SteeredOutput of the particles as they were."""


@dataclass(frozen=True)
class Reward:
    """A reward function, and which of ARGUMENTS it takes."""

    function: Callable[..., Any]
    name: str
    arguments: tuple[str, ...]

    @property
    def judges_prefixes(self) -> bool:
        return FINISHED in self.arguments

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError if texts are asked for and nothing can make them."""
        asked = [name for name in TEXTS if name in self.arguments]
        if asked and tokenizer is None:
            raise ValueError(
                f"reward {self.name} takes {' and '.join(asked)}, which are texts: pass tokenizer= to generate, or let it "
                f"take {' and '.join(IDS)}"
            )

    def __call__(
        self, prompts: list[list[int]], completions: list[list[int]], finished: list[bool], tokenizer: Any
    ) -> list[float]:
        """The rewards [N] of these token ids; RewardError if it raises, or returns anything but N numbers below +inf."""
        given: dict[str, Any] = {"prompt_ids": prompts, "completion_ids": completions, FINISHED: finished}
        for name, ids in zip(TEXTS, (prompts, completions), strict=True):
            if name in self.arguments:
                given[name] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        try:
            answer = self.function(**{name: given[name] for name in self.arguments})
        except Exception as error:  # it may raise whatever it likes
            raise RewardError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        return self._checked(answer, len(completions))

    def _checked(self, answer: Any, count: int) -> list[float]:
        try:
            values = np.asarray(answer.detach().cpu() if isinstance(answer, Tensor) else answer, dtype=np.float64)
        except (TypeError, ValueError):
            raise RewardError(f"reward {self.name} must return {count} numbers, got {_shown(answer)}") from None
        if values.shape != (count,):
            raise RewardError(f"reward {self.name} must return {count} numbers, got the shape {list(values.shape)}")
        wrong = [value for value in values.tolist() if math.isnan(value) or value == math.inf]
        if wrong:
            raise RewardError(f"reward {self.name} must return numbers below inf, or -inf, got {wrong[0]}")
        return values.tolist()


def find_reward(reward: str | Callable[..., Any]) -> Reward:
    """What ``reward`` stands for: a function, "module:function", or the name of a classifier, see ClassifierReward.

    Raises ValueError for what is none of these, and for a function with parameters that nobody fills.
    """
    function: Callable[..., Any]
    if isinstance(reward, str):
        function = named_object("reward", reward) if FUNCTION.fullmatch(reward) else ClassifierReward.named(reward)
    else:
        function = reward
    if not callable(function):
        raise ValueError(f"reward must be a function, 'module:function' or the name of a classifier, got {reward!r}")
    name = repr(getattr(function, "__name__", None) or (reward if isinstance(reward, str) else type(function).__name__))
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"reward {name} does not say what parameters it has; wrap it in a function") from None
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    taken = [p.name for p in named if p.name in ARGUMENTS and p.kind is not p.POSITIONAL_ONLY]
    for parameter in named:
        if parameter.name not in taken and parameter.default is parameter.empty:
            raise ValueError(
                f"reward {name} has a parameter {parameter.name!r}; what it can be given is {', '.join(ARGUMENTS)}"
            )
    if not {"completions", "completion_ids"} & set(taken):
        raise ValueError(f"reward {name} must take completions or completion_ids, else it has nothing to judge")
    return Reward(function, name, tuple(taken))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
