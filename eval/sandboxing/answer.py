"""The process of an answer: it runs the program and then does what the judging process asks for.

It holds neither the tests nor anything that could report a verdict: whatever the program does to this process, all it
can give is values.
"""

import os
import sys
from contextlib import suppress
from typing import Any

from eval.sandboxing.remote import OPERATIONS
from eval.sandboxing.wire import Wire


class Answer(Wire):
    """The answer's end of the wire."""

    def __init__(self, source: int, target: int):
        own = {"prepare": self.prepare, "execute": self.execute, "names": self.find_names}
        super().__init__(source, target, {**OPERATIONS, **own})
        self.scope: dict[str, Any] = {}  # of the program
        self.process, self.current_process, self.leave = os.getpid(), os.getpid, os._exit

    def prepare(self, source: str) -> None:
        """Run ``source`` in a namespace of its own."""
        exec(source, {})

    def execute(self, source: str) -> None:
        """Run ``source`` in the program's namespace, empty at first, as lm-eval's code_eval metric does."""
        try:
            exec(source, self.scope)
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()

    def find_names(self, names: list[str]) -> dict[str, Any]:
        """What the program calls by these names."""
        return {name: self.scope[name] for name in names if name in self.scope}

    def _send(self, *message: Any) -> None:
        if self.current_process() != self.process:
            self.leave(0)  # a child that the program has forked and that ran on to here
        super()._send(*message)


def serve(source: int, target: int) -> None:
    """Do what the judge asks for until it is gone."""
    sys.stdin = None  # reading from it is an error
    for name in [name for name in sys.modules if name.partition(".")[0] == "eval"]:
        del sys.modules[name]
    Answer(source, target).serve()
