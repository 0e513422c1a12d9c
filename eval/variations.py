"""Decoder specs with one key at several values, made and checked without torch."""

from collections.abc import Iterable, Sequence

from decoding.checks import check_choice
from decoding.spec import check_spec, open_keys


def vary(specs: Iterable[str], key: str, values: Sequence[str]) -> list[str]:
    """Each spec once for every value of ``key``; one that has no such key, or sets it already, stays as it is.

    >>> vary(["ntp", "sbd:block_size=8"], "entropy_bound", ["0", "0.1"])
    ['ntp', 'sbd:block_size=8,entropy_bound=0', 'sbd:block_size=8,entropy_bound=0.1']

    Raises ValueError if no spec has the key, or if it cannot have such a value.
    """
    specs = list(specs)
    keys = {spec: open_keys(spec) for spec in specs}
    known = sorted(set().union(*keys.values()))
    if not known:
        raise ValueError(f"key to vary: {', '.join(specs)} has no key that is not set, got {key!r}")
    check_choice(f"key to vary in {', '.join(specs)}", key, known)
    varied = [
        f"{spec}{',' if ':' in spec else ':'}{key}={value}" if key in keys[spec] else spec
        for spec in specs
        for value in (values if key in keys[spec] else values[:1])
    ]
    for spec in varied:
        check_spec(spec)
    return varied
