"""The engine: rows, slots, one generation loop, reveal rules, and the way into ``model.generate``.

A forward pass is a list of rows; a row sees at most two intervals of keys. A decoder is two functions around that
forward: ``plan`` says which rows to run, ``absorb`` decides tokens from their logits.

The names are those of :mod:`decoding.exports`, which is imported with the first of them: a module such as
:mod:`decoding.inputs.checks` can be used without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoding.exports import *  # noqa: F403


def __getattr__(name: str) -> Any:
    exports = import_module("decoding.exports") if name == "__all__" or not name.startswith("__") else None
    if exports is None or name not in (*exports.__all__, "__all__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(exports, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
