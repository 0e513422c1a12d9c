"""Decoder specs with one key at several values, made and checked without torch."""

import difflib
from collections.abc import Iterable, Sequence

from decoding.inputs.spec import check_spec, keys_of, split_spec


def vary(specs: Iterable[str], key: str, values: Sequence[str]) -> list[str]:
    """Each spec once for every value of ``key``; one that has no such key, or sets it already, stays as it is.

    >>> vary(["ntp", "sbd:block_size=8"], "entropy_bound", ["0", "0.1"])
    ['ntp', 'sbd:block_size=8,entropy_bound=0', 'sbd:block_size=8,entropy_bound=0.1']

    Raises ValueError if there is nothing to vary: an unknown key, one that every spec sets already, a missing value.
    """
    specs = list(specs)
    if not key or not all(values):
        raise ValueError(f"vary must be KEY=VALUE,VALUE,..., got {key + '=' + ','.join(values)!r}")
    keys = {spec: keys_of(spec) | _keys_within(spec) for spec in specs}
    parts = {spec: _with_key(spec, key) for spec in specs}
    if not any(parts.values()):
        known = sorted(set().union(*keys.values()))
        if key in known:
            raise ValueError(f"vary: {' and '.join(s for s in specs if key in keys[s])} sets {key} already")
        near = difflib.get_close_matches(key, known, 1)
        guess = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"vary: {key!r} is no key of {' or '.join(specs)}; {guess}")
    varied = []
    for spec in specs:
        start, end = parts[spec] or ("", "")
        varied += [start + value + end for value in values] if start else [spec]
    for spec in varied:
        check_spec(spec)
    return varied


def _keys_within(spec: str) -> set[str]:
    """The keys of the decoder that the one of ``spec`` is around."""
    inner = split_spec(spec)[1]
    return set() if inner is None else keys_of(inner) | _keys_within(inner)


def _with_key(spec: str, key: str) -> tuple[str, str] | None:
    """What stands before and behind the value of ``key`` once ``spec`` sets it; None if it has no such key or sets it already.

    A decoder around another has the key before the other may.
    """
    outer, inner = split_spec(spec)
    end = "" if inner is None else f",decoder={inner}"
    if key in keys_of(spec):
        is_set = key in {part.partition("=")[0].strip() for part in outer.partition(":")[2].split(",")}
        return None if is_set else (f"{outer}{',' if ':' in outer else ':'}{key}=", end)
    within = None if inner is None else _with_key(inner, key)
    return within and (f"{outer}{',' if ':' in outer else ':'}decoder={within[0]}", within[1])
