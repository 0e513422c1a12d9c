"""From tokens to text, one token at a time, and to text coloured by the forward that decided each token."""

import os
import re
from collections.abc import Iterable, Sequence

from rich.text import Text

# Neighbouring forwards get different colours that can be read on dark and on light ground.
COLOURS = ("cyan", "yellow", "green", "magenta", "bright_blue", "bright_red")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for part of a character
MASK = "\N{MIDDLE DOT}"
# What a terminal obeys instead of showing it (escape sequences, a lone carriage return, changes of the direction of
# writing), and what XML may not hold.
OBEYED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]|\r(?!\n)"
)


def visible(text: str) -> str:
    """``text`` with characters that a terminal would obey written as Python writes them.

    >>> print(visible("red: " + chr(27) + "[31m"))
    red: \\x1b[31m
    """
    return OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Detokenizer:
    """The text of each token as it comes: "" until a character is complete, so that pieces add up to the whole text.

    Every piece is decoded together with the piece before it, because some tokenizers drop the space of a first token.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """The text that ``token`` adds."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def split_text(tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text of every token; together they are what the tokenizer makes of all of them."""
    tokens = list(tokens)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokens]
    if not whole.startswith("".join(pieces)):  # tokens that mean something else beside others, such as single bytes
        pieces, end = [], 0
        for count in range(1, len(tokens) + 1):
            text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
            start, end = end, max(end, len(os.path.commonprefix([text, whole])))
            pieces.append(whole[start:end])
    if pieces:  # a character that is still incomplete at the end is what the tokenizer makes of it
        pieces[-1] += whole[len("".join(pieces)) :]
    return pieces


def coloured(prompt: str, pieces: Iterable[tuple[str, int | None]]) -> Text:
    """``prompt`` dimmed, then each (text, forward) in the colour of its forward; None is a mask, still undecided."""
    text = Text(visible(prompt), style="dim", end="")
    for piece, forward in pieces:
        text.append(visible(piece), style="dim" if forward is None else COLOURS[forward % len(COLOURS)])
    return text
