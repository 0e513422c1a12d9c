"""Worked additions: problems whose every step can be checked.

A problem is the line ``478 + 395 = ?``. Its solution adds digit by digit from the right: each line restates what is left
of the operands, adds their last digits, and writes out the digits found so far and the carry; the last line is
``478 + 395 = 873``. Two per cent of all pairs, chosen by a hash, are held out of every training set.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

HELD_OUT_SHARE = 0.02


@dataclass(frozen=True)
class Addition:
    """The sum of two non-negative integers, as text.

    >>> print(Addition(47, 5).prompt + Addition(47, 5).solution)
    47 + 5 = ?
    47 + 5: 7 + 5 = 12, write 2, carry 1
    4 + 0: 4 + 0 + 1 = 5, write 52, carry 0
    47 + 5 = 52
    <BLANKLINE>
    """

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a} + {self.b} = ?\n"

    @property
    def solution(self) -> str:
        lines, written, a, b, carry = [], "", self.a, self.b, 0
        while a or b or carry or not lines:
            terms = f"{a % 10} + {b % 10}" + (" + 1" if carry else "")
            total = a % 10 + b % 10 + carry
            written = f"{total % 10}{written}"
            lines.append(f"{a} + {b}: {terms} = {total}, write {written}, carry {total // 10}\n")
            a, b, carry = a // 10, b // 10, total // 10
        return "".join(lines) + f"{self.a} + {self.b} = {self.a + self.b}\n"

    @property
    def brief_solution(self) -> str:
        """The same steps without the operands and the digits found so far: harder, because digits must be counted."""
        lines, carry = [], 0
        width = max(len(str(self.a)), len(str(self.b)))
        for x, y in zip(str(self.a).zfill(width)[::-1], str(self.b).zfill(width)[::-1], strict=True):
            terms = f"{x} + {y}" + (" + 1" if carry else "")
            carry, digit = divmod(int(x) + int(y) + carry, 10)
            lines.append(f"{terms} = {10 * carry + digit}, write {digit}, carry {carry}\n")
        return "".join(lines) + f"{self.a} + {self.b} = {self.a + self.b}\n"

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(f"{self.a}+{self.b}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32

    def is_answered_by(self, completion: str) -> bool:
        """True if the last line of ``completion`` states the right sum; the steps before it are not judged."""
        lines = completion.strip().splitlines()
        return bool(lines) and lines[-1].strip() == f"{self.a} + {self.b} = {self.a + self.b}"


def additions(seed: int, held_out: bool, digits: range = range(2, 5)) -> Iterator[Addition]:
    """Yield an endless, reproducible stream of additions of one side of the split, lengths uniform over ``digits``."""
    draw = random.Random(seed)
    while True:
        a, b = (draw.randrange(10 ** (n - 1), 10**n) for n in draw.choices(digits, k=2))
        if (problem := Addition(a, b)).is_held_out == held_out:
            yield problem
