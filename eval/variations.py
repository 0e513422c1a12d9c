"""Decoder specs with one key at several values, made and checked without torch."""

import difflib
from collections.abc import Iterable, Sequence

from decoding.spec import check_spec, open_keys


def vary(specs: Iterable[str], key: str, values: Sequence[str]) -> list[str]:
    """Each spec once for every value of ``key``; one that has no such key, or sets it already, stays as it is.

    >>> vary(["ntp", "sbd:block_size=8"], "entropy_bound", ["0", "0.1"])
    ['ntp', 'sbd:block_size=8,entropy_bound=0', 'sbd:block_size=8,entropy_bound=0.1']

    Raises ValueError if there is nothing to vary (an unknown key, one that every spec sets already, a missing value), or
    if the key cannot have such a value.
    """
    specs = list(specs)
    if not all(values):
        raise ValueError(f"vary must be KEY=VALUE,VALUE,..., got {key + '=' + ','.join(values)!r}")
    keys = {spec: open_keys(spec) for spec in specs}
    if not any(key in free for free in keys.values()):
        sets = [spec for spec in specs if f",{key}=" in spec.replace(":", ",")]
        if sets:
            raise ValueError(f"vary: {' and '.join(sets)} sets {key} already")
        known = sorted(set().union(*keys.values()))
        near = difflib.get_close_matches(key, known, 1)
        guess = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"vary: {key!r} is no key of {' or '.join(specs)}; {guess}")
    varied = [
        f"{spec}{',' if ':' in spec else ':'}{key}={value}" if key in keys[spec] else spec
        for spec in specs
        for value in (values if key in keys[spec] else values[:1])
    ]
    for spec in varied:
        check_spec(spec)
    return varied
