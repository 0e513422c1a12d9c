"""Decoder specs with one key at several values, made and checked without torch."""

import difflib
from collections.abc import Iterable, Sequence

from decoding.inputs.spec import check_spec, keys_of


def vary(specs: Iterable[str], key: str, values: Sequence[str]) -> list[str]:
    """Each spec once for every value of ``key``; one that has no such key, or sets it already, stays as it is.

    >>> vary(["ntp", "sbd:block_size=8"], "entropy_bound", ["0", "0.1"])
    ['ntp', 'sbd:block_size=8,entropy_bound=0', 'sbd:block_size=8,entropy_bound=0.1']

    Raises ValueError if there is nothing to vary: an unknown key, one that every spec sets already, a missing value.
    """
    specs = list(specs)
    if not key or not all(values):
        raise ValueError(f"vary must be KEY=VALUE,VALUE,..., got {key + '=' + ','.join(values)!r}")
    keys = {spec: keys_of(spec) for spec in specs}
    free = {
        spec: keys[spec] - {part.partition("=")[0].strip() for part in spec.partition(":")[2].split(",")}
        for spec in specs
    }
    if not any(key in names for names in free.values()):
        known = sorted(set().union(*keys.values()))
        if key in known:
            raise ValueError(f"vary: {' and '.join(s for s in specs if key in keys[s])} sets {key} already")
        near = difflib.get_close_matches(key, known, 1)
        guess = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"vary: {key!r} is no key of {' or '.join(specs)}; {guess}")
    varied = []
    for spec in specs:
        start = f"{spec}{',' if ':' in spec else ':'}{key}="
        varied += [start + value for value in values] if key in free[spec] else [spec]
    for spec in varied:
        check_spec(spec)
    return varied
