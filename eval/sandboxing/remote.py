"""Objects that are no plain values stay in their own process; the other one holds a ``Remote`` for each.

What one does with a Remote is done where its object lives, with two exceptions. Operators are defined between two
Remotes of one process only, so that an object never sees the plain value that a test compares it with: it is equal to
none. And special attributes are not looked up: the protocols of other libraries (numpy's arrays, pickle) are for objects
that live here.
"""

import copy
import operator
from typing import Any

UNARY = {
    "iter": iter,
    "next": next,
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
    "int": int,
    "float": float,
    "index": operator.index,
    "hash": hash,
    "abs": abs,
    "neg": operator.neg,
    "copy": copy.copy,
}
BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
BINARY += ("eq", "ne", "lt", "le", "gt", "ge")
# What one process may ask the other to do with an object; calls are in wire.py.
OPERATIONS = {
    **UNARY,
    **{name: getattr(operator, name) for name in BINARY},
    "deepcopy": copy.deepcopy,
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "isinstance": isinstance,
}
VISIBLE = ("__name__", "__qualname__", "__dict__")


class Remote:
    """An object of the other process: ``number`` of those that it has shown on ``wire``."""

    __slots__ = ("_Remote__place",)

    def __init__(self, wire: Any, number: int):
        object.__setattr__(self, "_Remote__place", (wire, number))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return place_of(self)[0].call(self, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and name not in VISIBLE:
            raise AttributeError(name)
        return _ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return _ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        _ask("delitem", self, key)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and _ask("isinstance", value, self) is True

    def __deepcopy__(self, memo: dict) -> Any:
        return _ask("deepcopy", self)


def place_of(remote: Remote) -> tuple[Any, int]:
    """Wire and number of ``remote``."""
    return object.__getattribute__(remote, "_Remote__place")


def _ask(name: str, remote: Remote, *arguments: Any) -> Any:
    return place_of(remote)[0].ask(name, remote, *arguments)


def _unary(name: str):
    return lambda self: _ask(name, self)


def _binary(name: str):
    return lambda self, other: _ask(name, self, other) if isinstance(other, Remote) else NotImplemented


for _name in UNARY:
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in BINARY:
    setattr(Remote, f"__{_name.strip('_')}__", _binary(_name))
