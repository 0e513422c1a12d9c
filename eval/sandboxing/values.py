"""Plain values as JSON: numbers, text, containers and a few kinds of the standard library, nothing that runs code.

None, bool, int, float and str are themselves; all else is a list that begins with a tag: ["l", 1, 2] is a list. What is
no plain value travels as a reference, which the caller makes (``refer``) and looks up (``resolve``). A value of a
subclass travels as its plain base: an int that says it is equal to everything arrives as an int.
"""

import builtins
import importlib
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 200  # of containers in each other
LARGE = 2**63  # larger integers travel in base 16, which takes time in proportion to their length
LONG = 1024  # elements; longer containers travel in pieces of as many, if there is a way for them

CONTAINERS = {list: "l", tuple: "t", set: "s", frozenset: "f", dict: "d"}
# Lists and tuples of texts alone, joined, and of numbers alone, which JSON takes as they are.
WORDS = {list: "w", tuple: "W"}
NUMBERS = {list: "L", tuple: "T"}
SEPARATOR = "~"  # a character that JSON leaves as it is
SIMPLE = {type(None), bool, int, float, str}
PLAIN_BASES = (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)
# Kinds of the standard library: what to build them from.
STANDARD: dict[str, Callable[[Any], tuple]] = {
    "builtins.range": lambda x: (x.start, x.stop, x.step),
    "builtins.slice": lambda x: (x.start, x.stop, x.step),
    "builtins.dict_keys": lambda x: (list(x),),
    "builtins.dict_items": lambda x: (list(x),),
    "collections.deque": lambda x: (list(x), x.maxlen),
    "datetime.date": lambda x: (x.year, x.month, x.day),
    "datetime.timedelta": lambda x: (x.days, x.seconds, x.microseconds),
    "decimal.Decimal": lambda x: (str(x),),
    "fractions.Fraction": lambda x: (x.numerator, x.denominator),
}
VIEWS = {
    "builtins.dict_keys": lambda keys: dict.fromkeys(keys).keys(),
    "builtins.dict_items": lambda pairs: dict(pairs).items(),
}
Refer = Callable[[Any], list]
Split = Callable[[str, Iterable], list]


class Odd(Exception):
    """A message that no honest process sends."""


def encode(value: Any, refer: Refer, split: Split | None = None, depth: int = MAX_DEPTH) -> Any:
    """The tree that stands for ``value``.

    refer: gives the reference for what is no plain value. split: gives the one for a long container, from its tag and
    its elements.

    >>> encode({"a": (1, 2.5)}, refer=repr)
    ['d', 'a', ['t', 1, 2.5]]

    Raises RecursionError if it is nested too deeply.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -LARGE < value < LARGE else ["i", format(value, "x")]
    if kind is float:
        return value if math.isfinite(value) else ["n", repr(value)]
    if depth == 0:
        raise RecursionError("a value is nested too deeply to leave its process")
    if kind in CONTAINERS:
        parts = value if kind is not dict else [x for pair in value.items() for x in pair]
        if split and len(parts) > LONG:
            return split(CONTAINERS[kind], parts)
        if kind in WORDS and (found := _uniform(value, kind)):
            return found
        return [CONTAINERS[kind], *[encode(x, refer, split, depth - 1) for x in parts]]
    if kind is complex:
        return ["c", encode(value.real, refer), encode(value.imag, refer)]
    if kind is bytes or kind is bytearray:
        return ["b" if kind is bytes else "a", value.decode("latin-1")]
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return ["y", value.__name__]
    for base in PLAIN_BASES:
        if base in kind.__mro__:
            return encode(_as_base(value, base), refer, split, depth)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in STANDARD:
        return ["v", name, *[encode(x, refer, split, depth - 1) for x in STANDARD[name](value)]]
    if kind.__module__ == "numpy" and any(base.__name__ == "generic" for base in kind.__mro__):
        return encode(value.item(), refer, split, depth - 1)
    return refer(value)


def decode(tree: Any, resolve: Callable[[str, list], Any], depth: int = MAX_DEPTH) -> Any:
    """The value that ``tree`` stands for; ``resolve(tag, rest)`` looks up a reference.

    Raises Odd, or another Exception, for a tree that ``encode`` does not make.
    """
    if type(tree) in SIMPLE:
        return tree
    if type(tree) is not list or not tree or type(tree[0]) is not str or depth == 0:
        raise Odd("no plain value")
    tag, *rest = tree
    if tag in ("L", "T"):
        return _numbers(rest, tag)
    if tag in ("w", "W"):
        return _words(*rest, tag)
    if tag in ("l", "t", "s", "f", "d"):
        return build(tag, [decode(x, resolve, depth - 1) for x in rest])
    if tag in ("i", "n", "a", "b", "y"):
        return _from_text(tag, *rest)
    if tag == "c":
        return complex(*(decode(x, resolve, 1) for x in rest))
    if tag == "v":
        return _standard(rest[0], [decode(x, resolve, depth - 1) for x in rest[1:]])
    return resolve(tag, rest)


def build(tag: str, parts: list) -> Any:
    """The container with this tag and these elements."""
    if tag == "d":
        return dict(zip(parts[::2], parts[1::2], strict=True))
    return parts if tag == "l" else {"t": tuple, "s": set, "f": frozenset}[tag](parts)


def _uniform(value: list | tuple, kind: type) -> list | None:
    """A short tree for texts or for numbers, or None; it takes a tenth of the time of one by one."""
    if not value:
        return None
    if type(value[0]) is str:
        try:
            text = SEPARATOR.join(value)
        except TypeError:
            return None
        return [WORDS[kind], text] if text.count(SEPARATOR) == len(value) - 1 else None
    kinds = set(map(type, value))
    small = kinds == {int} and -LARGE < min(value) and max(value) < LARGE
    return [NUMBERS[kind], *value] if small or (kinds == {float} and all(map(math.isfinite, value))) else None


def _numbers(parts: list, tag: str) -> list | tuple:
    if not set(map(type, parts)) <= {int, float}:
        raise Odd("no numbers")
    return parts if tag == "L" else tuple(parts)


def _words(text: str, tag: str) -> list | tuple:
    parts = text.split(SEPARATOR)
    if len(_texts) > LONG:
        _texts.clear()
    # Each text once, as where the value comes from: the same ones a million times would need too much memory.
    known = map(_texts.setdefault, parts, parts)
    return list(known) if tag == "w" else tuple(known)


_texts: dict[str, str] = {}


def _as_base(value: Any, base: type) -> Any:
    """The plain value inside one of a subclass, whatever the subclass makes of operators."""
    if base in (int, float):
        return base.__pos__(value)
    if base is complex:
        return complex(value.real, value.imag)
    if base is str:
        return str.__str__(value)
    return dict(dict.items(value)) if base is dict else base(base.__iter__(value))


def _from_text(tag: str, text: str) -> Any:
    if tag == "i":
        return int(text, 16)
    if tag == "n":
        # One and the same nan, so that containers of it are equal as they are within one process.
        return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text]
    if tag in "ab":
        return (bytes if tag == "b" else bytearray)(text.encode("latin-1"))
    kind = getattr(builtins, text)
    if not isinstance(kind, type):
        raise Odd("no type")
    return kind


def _standard(name: str, parts: list) -> Any:
    if name in VIEWS:
        return VIEWS[name](*parts)
    if name not in STANDARD:
        raise Odd("no kind of the standard library")
    module, _, kind = name.partition(".")
    return getattr(importlib.import_module(module), kind)(*parts)


def _no_constant(name: str) -> None:
    raise Odd(f"{name} in JSON")


dump = json.JSONEncoder(separators=(",", ":")).encode
parse = json.JSONDecoder(parse_constant=_no_constant).decode
