"""Decoding with recorded acceptance on any weights: all of the work is done, only what comes out of it is given.

Random weights of a large shape cost as much per forward as the real ones, but accept nothing. So the text is laid down
beforehand, cut into pieces of as many tokens as each recorded forward brought, and the logits of each row are raised where
its token is: causal rows predict the text; rows of blocks predict it up to the start of a piece, where they are wrong. And
each piece is copied from the prompt, so prompt lookup finds it, up to its end.
"""

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding import Engine
from decoding.forward.cache import SlotCache
from decoding.forward.rows import Rows

DIGIT = 128  # of a token id in hidden states; bf16 holds all integers up to 256
DIGITS = 3
SURE, UNSURE = 50.0, 0.5  # how far the given token stands above all others, in nats


class ReplayEngine(Engine):
    """An engine whose rows predict ``text``; one prompt at a time.

    text: token ids by position. starts: the positions where pieces start, in order, each the first that blocks get wrong.
    """

    def __init__(
        self, model: PreTrainedModel, text: Sequence[int], starts: Sequence[int], mask_token_id: int, static: bool
    ):
        super().__init__(model, static=static)
        self.text, self.starts, self.mask_token_id = list(text), list(starts), mask_token_id

    def forward(self, rows: Rows, cache: SlotCache) -> Tensor:
        """Hidden states [B, R, D + 4]: what each row will predict stands behind its state."""
        hidden = super().forward(rows, cache)
        tokens, positions, is_block = (x[0].tolist() for x in (rows.tokens, rows.positions, rows.is_block))
        masked = [
            p for t, p, block in zip(tokens, positions, is_block, strict=True) if block and t == self.mask_token_id
        ]
        piece = self._piece(masked[0]) if masked else 0
        tags = []
        for position, block in zip(positions, is_block, strict=True):
            target = self._token(position + (not block))
            if block and position in self.starts:
                target = (target + 1) % self.mask_token_id
            digits = [target // DIGIT**i % DIGIT for i in range(DIGITS)]
            tags.append([*digits, float(not block or self._piece(position) == piece)])
        return torch.cat([hidden, torch.tensor([tags], dtype=hidden.dtype, device=hidden.device)], dim=-1)

    def head(self, hidden: Tensor) -> Tensor:
        """Float32 logits [N, V], those of the model but for the given token's."""
        states, tags = hidden[:, : -DIGITS - 1], hidden[:, -DIGITS - 1 :].float()
        logits = super().head(states)
        target = (tags[:, :DIGITS] * torch.tensor([DIGIT**i for i in range(DIGITS)], device=tags.device)).sum(-1).long()
        raised = logits.amax(-1) + torch.where(tags[:, -1] > 0, SURE, UNSURE)
        return logits.scatter_(1, target[:, None], raised[:, None])

    def _piece(self, position: int) -> int:
        return bisect.bisect_right(self.starts, position)

    def _token(self, position: int) -> int:
        return self.text[position] if position < len(self.text) else self.text[-1]


def lay_down(lengths: Sequence[int], context: int, count: int, vocab_size: int) -> tuple[list[int], list[int]]:
    """A text of ``context`` + ``count`` tokens, and where its pieces start, of ``lengths`` tokens, over and over.

    The first ``context`` are the prompt, which holds no token twice if the vocabulary suffices; pieces are copied from it.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randperm(vocab_size - 1, generator=generator)[:context].tolist()
    text, starts, size, last = list(prompt), [], max(lengths), -1
    places: list[int] = []
    for length in itertools.cycle(lengths):
        if len(text) >= context + count:
            return text[: context + count], starts
        starts.append(len(text))
        if not places:  # pieces that do not overlap, each once before any comes again
            places = torch.randperm(max(1, context // size), generator=generator).tolist()
        place = places.pop()
        if place == last + 1 and places:  # else the piece before would go on
            places, place = [place, *places[:-1]], places[-1]
        last = place
        text += prompt[place * size : place * size + length]
    raise AssertionError("an endless cycle has ended")


def recorded_lengths(source: str) -> list[int]:
    """Tokens of each forward: from a mean number of tokens per forward, or a JSON file with a list of accepted drafts.

    >>> recorded_lengths("2.5")
    [2, 3]
    """
    try:
        mean = float(source)
    except ValueError:
        return [1 + accepted for accepted in _read(source)]
    if not 1 <= mean <= 16:
        raise ValueError(f"replay: tokens per forward must be from 1 to 16, got {source}")
    return list(_spread(mean))


def _spread(mean: float, most: int = 20) -> Iterator[int]:
    """Whole numbers that are ``mean`` on average, the shortest such list of at most ``most``."""
    count = next((n for n in range(1, most + 1) if abs(n * mean - round(n * mean)) < 1e-6), most)
    for i in range(count):
        yield int((i + 1) * mean + 1e-6) - int(i * mean + 1e-6)


def _read(source: str) -> list[int]:
    try:
        lengths = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"replay: {source!r} is neither a number nor a JSON file of accepted drafts: {error}"
        ) from None
    if not isinstance(lengths, list) or not lengths or not all(isinstance(n, int) and 0 <= n < 64 for n in lengths):
        raise ValueError(f"replay: {source!r} must hold a list of numbers of accepted drafts from 0 to 63")
    return lengths
