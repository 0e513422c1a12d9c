"""From tokens to text, one token at a time, and to text coloured by the forward that decided each token."""

from collections.abc import Iterable, Sequence

from rich.text import Text

# Neighbouring forwards get different colours that can be read on dark and on light ground.
COLOURS = ("cyan", "yellow", "green", "magenta", "bright_blue", "bright_red")
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for part of a character
MASK = "\N{MIDDLE DOT}"


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
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in tokens]


def coloured(prompt: str, pieces: Iterable[tuple[str, int | None]]) -> Text:
    """``prompt`` dimmed, then each (text, forward) in the colour of its forward; None is a mask, still undecided."""
    text = Text(prompt, style="dim", end="")
    for piece, forward in pieces:
        text.append(piece, style="dim" if forward is None else COLOURS[forward % len(COLOURS)])
    return text
