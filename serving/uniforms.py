"""Random numbers that depend on a request's seed and on a position in its text, and on nothing else.

Not on the batch around the request, nor on how many forwards there were: after a preemption the same numbers come again.
"""

from torch import Tensor

TEST, DRAW = 0, 1  # what a number is for: the test of a draft at a position, or the token there


def uniforms(seeds: Tensor, positions: Tensor, purpose: int) -> Tensor:
    """Numbers in [0, 1), float64, of the shape of ``positions``, both int64 and broadcast against each other.

    SplitMix64 (Steele, Lea and Flood, 2014) of the seed, stepped to the position: 53 of its bits.
    """
    golden = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    start = _mixed(seeds)  # else neighbouring seeds would run through the same numbers one step apart
    mixed = _mixed(start + (2 * positions + (1 + purpose)) * golden)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64, which PyTorch shifts with its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
