"""What the first of several processes does for all of them: look at files, and say something once."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def note(sentence: str) -> None:
    """Say ``sentence`` to the user, once however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr)


def on_first_process(function: Callable[[], Result]) -> Result:
    """What ``function()`` returns on the first process, on all of them; likewise the ValueError that it raises."""
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function()
        except ValueError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
