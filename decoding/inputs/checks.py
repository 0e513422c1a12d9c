"""Checks of values that users type: each raises a ValueError that names the field, the value and what is allowed."""

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin


def check_choice(field: str, value: Any, allowed: Collection) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_range(
    field: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    include_low: bool = True,
    include_high: bool = True,
) -> None:
    """Raise unless ``value`` is a number between ``low`` and ``high``; nan is never allowed."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above = is_number and (value >= low if include_low else value > low)
    below = is_number and (value <= high if include_high else value < high)
    if not (above and below):
        interval = f"{'[' if include_low else '('}{low:g}, {high:g}{']' if include_high else ')'}"
        raise ValueError(f"{field} must be a number in {interval}, got {value!r}")


def check_count(field: str, value: Any, low: int = 1, high: int | None = None) -> None:
    """Raise unless ``value`` is a whole number from ``low`` to ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{field} must be a whole number {allowed}, got {value!r}")


KINDS: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Mapping: "a mapping of names to values",
}


def check_type(field: str, value: Any, annotation: Any) -> None:
    """Raise unless ``value`` is what ``annotation`` says, as far as that is made of KINDS, None and tuples of texts.

    A whole number is a number, and True is none.
    """
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [get_origin(part) or part for part in parts]
    names = [KINDS[kind] for kind in kinds if kind in KINDS]
    if kinds == [tuple] and get_args(annotation) == (str, ...):
        names, right = ["a list of texts"], isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    elif len(names) < sum(kind is not NoneType for kind in kinds):
        return
    else:
        right = any(_is_kind(value, kind) for kind in kinds)
    if not right:
        raise ValueError(f"{field} must be {' or '.join(names)}, got {value!r}")


def _is_kind(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def check_named(field: str, value: Any, allowed: Collection) -> None:
    """Raise unless ``value`` is a class, or a text of names from ``allowed`` and of "module:Class", joined by "+"."""
    for name in value.split("+") if isinstance(value, str) else [] if callable(value) else [value]:
        if not (isinstance(name, str) and ":" in name):
            check_choice(field, name, allowed)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a message about the unknown ``name``: the nearest known one, nothing if none is near.

    >>> did_you_mean("blok_size", ["block_size", "rule"])
    ", did you mean 'block_size'?"
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def named_object(field: str, name: str) -> Any:
    """What ``module:Name`` stands for, imported; ValueError if the text, the module or the name is wrong.

    >>> named_object("rule", "decoding.rules:TopK").__name__
    'TopK'
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for text in (module, attribute) for part in text.split(".")):
        raise ValueError(f"{field} must be written module:Name, got {name!r}")
    try:
        return reduce(getattr, attribute.split("."), import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field} {name!r} cannot be imported: {error}") from error


def warn_untrained_size(model: Any, block_size: int) -> None:
    """Warn if the model names the block sizes it was trained with and this one is not among them."""
    trained = getattr(model.generation_config, "trained_block_sizes", None)
    if trained and block_size > 1 and block_size not in trained:
        warnings.warn(
            f"block_size={block_size}: this model was trained with block sizes {min(trained)} to {max(trained)}; "
            f"expect worse text",
            stacklevel=2,
        )
