"""The wire between the process of an answer and the one that judges it: questions and replies, a line of JSON each.

    ["ask", name, arguments]              do ``name``, one of the other side's ``handlers``
    ["value", value]                      the reply
    ["raised", type, arguments, text]     the reply if it raised an exception

Whoever waits for a reply answers questions meanwhile: a test may give the answer a function to call. References (see
values.py): ["o", n] is an object of the sender, ["r", n] one of the receiver, ["e", n, name, base] an exception class
of the sender, of which the receiver makes one of its own, and ["p", n, tag] a container that the receiver asks for in
pieces.
"""

import builtins
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

from eval.sandboxing.remote import Remote, place_of
from eval.sandboxing.values import LONG, Odd, build, decode, dump, encode, parse

MESSAGE_BYTES = 2**26
SHAPES = {"ask": 3, "value": 2, "raised": 4}
MUTABLE = (list, dict, set, bytearray)
GONE = "the other side is gone"
UNPRINTABLE = "an exception that cannot be printed"


class Ended(BaseException):
    """The other side is gone, or sent what is no message; no test may catch it as an exception of the answer."""


class Wire:
    """One end of the wire."""

    def __init__(self, source: int, target: int, handlers: dict[str, Callable[..., Any]]):
        """source, target: descriptors to read from and to write to. handlers: what the other side may ask for."""
        self.source, self.target = open(source, "rb"), target
        self.handlers = {"call": self._called, "piece": self._next_piece, **handlers}
        self.write = os.write  # a program may patch the module
        self.ended: str | None = None  # why
        self.objects: list[Any] = []  # that the other side knows; ``numbers`` finds them by identity
        self.numbers: dict[int, int] = {}
        self.remotes: dict[int, Any] = {}  # what stands for objects of the other side
        self.classes: dict[type, int] = {}  # those of them that are exception classes
        self.split_numbers = count()
        self.pieces: dict[int, Iterator] = {}  # what is still to be sent of long containers

    def ask(self, name: str, *arguments: Any) -> Any:
        """Let the other side do ``name``; returns its value or raises its exception, or Ended."""
        self._send("ask", name, self._encode(arguments))
        while (message := self._receive())[0] == "ask":
            self._serve(*message[1:])
        if message[0] == "value":
            return self._decode(message[1])
        raise self._rebuild(name, *map(self._decode, message[1:]))

    def call(self, function: Remote, arguments: tuple, keywords: dict) -> Any:
        """Call a function of the other side; lists and the like that it changed change here too."""
        result = self.ask("call", function, list(arguments), keywords)
        try:
            value, changed = result
            for place, now in changed.items():
                _change(arguments[place], now)
        except (TypeError, ValueError, AttributeError, LookupError):
            self._end("an odd reply to a call")
        return value

    def serve(self) -> None:
        """Answer questions until the other side is gone."""
        try:
            while True:
                message = self._receive()
                if message[0] != "ask":
                    self._end("a reply without a question")
                self._serve(*message[1:])
        except Ended:
            return

    def exports(self, value: Any) -> bool:
        """Whether ``value`` is an object that the other side knows."""
        return id(value) in self.numbers

    def allow(self, value: Any) -> None:
        """Raise TypeError if the other side may not know ``value``, which is no plain value."""

    def _called(self, function: Any, arguments: list, keywords: dict) -> tuple[Any, dict[int, Any]]:
        """The value of a call, and those of its arguments that it changed."""
        before = {i: encode(x, self._refer) for i, x in enumerate(arguments) if type(x) in MUTABLE}
        value = function(*arguments, **keywords)
        return value, {i: arguments[i] for i, tree in before.items() if encode(arguments[i], self._refer) != tree}

    def _serve(self, name: Any, arguments: Any) -> None:
        values = self._decode(arguments)
        if type(name) is not str or name not in self.handlers or type(values) is not tuple:
            self._end("an odd question")
        try:
            reply = ["value", self._encode(self.handlers[name](*values))]
        except Ended:
            raise
        except BaseException as error:
            reply = ["raised", *self._describe(error)]
        self._send(*reply)

    def _describe(self, error: BaseException) -> list:
        """Type, arguments and text of an exception, as trees."""
        try:
            text = str.__str__(str(error))[:500]
        except BaseException:
            text = UNPRINTABLE
        try:
            arguments = self._encode(error.args)
        except BaseException:
            arguments = ["t", text]
        return [self._encode(type(error)), arguments, text]

    def _rebuild(self, name: str, kind: Any, arguments: Any, text: Any) -> BaseException:
        """The exception that the other side raised when it was asked for ``name``."""
        if not (isinstance(kind, type) and issubclass(kind, BaseException) and type(text) is str):
            self._end("an odd exception")
        if issubclass(kind, StopIteration) and name != "next":  # it would end an iteration on this side
            return RuntimeError(f"{kind.__name__} was raised")
        try:
            error = kind(*arguments)
            return error if str(error) == text else type(kind.__name__, (kind,), {"__str__": lambda self: text})()
        except Exception:
            return RuntimeError(f"{kind.__name__}: {text}")

    def _refer(self, value: Any) -> list:
        if isinstance(value, Remote):
            return ["r", place_of(value)[1]]
        if isinstance(value, type) and value in self.classes:
            return ["r", self.classes[value]]
        self.allow(value)
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        if isinstance(value, type) and issubclass(value, BaseException):
            base = next(base for base in value.__mro__ if getattr(builtins, base.__name__, None) is base)
            return ["e", number, value.__name__, base.__name__]
        return ["o", number]

    def _split(self, tag: str, parts: Iterable) -> list:
        number = next(self.split_numbers)
        self.pieces[number] = iter(parts)
        return ["p", number, tag]

    def _next_piece(self, number: int) -> list:
        piece = list(islice(self.pieces[number], LONG))
        if len(piece) < LONG:
            del self.pieces[number]
        return piece

    def _join(self, number: int, tag: str) -> Any:
        parts: list = []
        while True:
            piece = self.ask("piece", number)
            if type(piece) is not list:
                raise Odd("no piece")
            parts += piece
            if len(piece) < LONG:
                return build(tag, parts)

    def _resolve(self, tag: str, rest: list) -> Any:
        if tag == "p":
            return self._join(*rest)
        number = rest[0]
        if type(number) is not int or number < 0:
            raise Odd("no number")
        if tag == "r":
            return self.objects[number]
        if number not in self.remotes:
            if tag == "e":
                _, name, base = rest
                base = getattr(builtins, base)
                if not issubclass(base, BaseException):
                    raise Odd("no exception")
                self.remotes[number] = type(name, (base,), {})
                self.classes[self.remotes[number]] = number
            elif tag == "o":
                self.remotes[number] = Remote(self, number)
            else:
                raise Odd("no reference")
        return self.remotes[number]

    def _send(self, *message: Any) -> None:
        if self.ended:
            raise Ended(self.ended)
        data = memoryview(dump(list(message)).encode() + b"\n")
        try:
            while data:
                data = data[self.write(self.target, data) :]
        except BrokenPipeError:
            self._end(GONE)

    def _receive(self) -> list:
        if self.ended:
            raise Ended(self.ended)
        line = self.source.readline(MESSAGE_BYTES)
        if not line:
            self._end(GONE)
        try:
            message = parse(line.decode("ascii"))
            if type(message) is list and len(message) == SHAPES[message[0]]:
                return message
        except (ValueError, TypeError, LookupError, RecursionError, Odd):
            pass
        self._end("no message")

    def _encode(self, value: Any) -> Any:
        return encode(value, self._refer, self._split)

    def _decode(self, tree: Any) -> Any:
        try:
            return decode(tree, self._resolve)
        except Exception as error:  # whatever is wrong with it
            self._end(f"an odd value: {type(error).__name__}")

    def _end(self, reason: str) -> None:
        self.ended = reason
        raise Ended(reason)


def _change(old: Any, new: Any) -> None:
    """Give ``old`` the content of ``new``, which is of the same mutable type."""
    if type(old) is not type(new):
        raise TypeError("a changed argument has another type")
    if type(old) in (list, bytearray):
        old[:] = new
    else:
        old.clear()
        old.update(new)
