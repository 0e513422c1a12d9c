"""Random requests to ``generate``: everything in one follows from its seed."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from decoding import NextTokenDecoder
from rpt import ResampleDecoder
from sbd import SelfSpeculativeDecoder, SetBlockDecoder
from tests.conftest import BOS, FAMILIES, MASK, PAD, VOCAB

TOKENS = range(3, MASK)


# --- decoders that are exact; what is true of the last two only for what they accept


def _lossless(pick: random.Random, draft: str) -> SelfSpeculativeDecoder:
    size = pick.randint(2, 7)
    return SelfSpeculativeDecoder(size, pick.choice(["all", "alternate", 0, 1, min(3, size)]), draft)


DECODERS = {
    "ntp": lambda pick: NextTokenDecoder(),
    "sbd-lossless": lambda pick: _lossless(pick, pick.choice(["mask", "both"])),
    "prompt-lookup": lambda pick: _lossless(pick, "prompt_lookup"),
    "rpt": lambda pick: ResampleDecoder(iterations=0),
    "sbd": lambda pick: SetBlockDecoder(block_size=1),
}
MAY_REFUSE = ("rpt", "sbd")


# --- settings: each of these is asked for in some of the cases


def _words(pick: random.Random, longest: int, count: int) -> list[list[int]]:
    return [pick.choices(TOKENS, k=pick.randint(1, longest)) for _ in range(count)]


@dataclass
class PrefixFunction:
    """Allows by the place and the last token; raises for a text that has said, from ``width`` on, what was not allowed."""

    modulus: int
    shift: int
    width: int = 10**9

    def __call__(self, place: int, text: torch.Tensor) -> list[int]:
        text = text.tolist()
        for i in range(self.width, len(text)):
            assert text[i] == PAD or self.allows(place, text[i - 1], text[i]), f"place {place} never said {text}"
        return [token for token in TOKENS if self.allows(place, text[-1], token)]

    def allows(self, place: int, last: int, token: int) -> bool:
        return (token + last + place * self.shift) % self.modulus > 0


SETTINGS = {
    "min_new_tokens": lambda pick: pick.randint(1, 8),
    "repetition_penalty": lambda pick: pick.choice([0.7, 1.2, 1.8]),
    "encoder_repetition_penalty": lambda pick: pick.choice([0.8, 1.5]),
    "no_repeat_ngram_size": lambda pick: pick.randint(1, 3),
    "encoder_no_repeat_ngram_size": lambda pick: pick.randint(1, 3),
    "bad_words_ids": lambda pick: _words(pick, 2, pick.randint(1, 30)),
    "sequence_bias": lambda pick: [[word, pick.uniform(-9.0, 9.0)] for word in _distinct(_words(pick, 3, 20))],
    "exponential_decay_length_penalty": lambda pick: (pick.randint(0, 6), pick.uniform(1.01, 1.5)),
    "forced_eos_token_id": lambda pick: pick.choice(TOKENS),
    "begin_suppress_tokens": lambda pick: pick.sample(TOKENS, 40),
    "renormalize_logits": lambda pick: True,
    "remove_invalid_values": lambda pick: True,
    "stop_strings": lambda pick: pick.sample(["a", "e", "th", "end", "1", "\n\n", "Zz", "a b"], 3),
    "prefix_allowed_tokens_fn": lambda pick: PrefixFunction(pick.choice([2, 3]), pick.randrange(7)),
}
# What means something while tokens to the left are undecided.
INSIDE_BLOCKS = ("min_new_tokens", "repetition_penalty", "renormalize_logits", "remove_invalid_values", "stop_strings")


def _distinct(words: list[list[int]]) -> list[list[int]]:
    return [list(word) for word in dict.fromkeys(map(tuple, words))]


# --- processors and criteria of a user's own; made anew for every run


class InPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.div_(2).scatter_(1, input_ids[:, -1:], -50.0)


def by_last_token(ids, scores):
    return scores + (ids[:, -1:] % 7 == torch.arange(scores.shape[1]) % 7) * 4.0


class PerPlace(LogitsProcessor):
    """Holds a bias for every place of the batch."""

    def __init__(self, batch_size: int):
        self.bias = torch.randn(batch_size, VOCAB, generator=torch.Generator().manual_seed(batch_size)) * 3

    def __call__(self, input_ids, scores):
        return scores + self.bias


class Counting(LogitsProcessor):
    """Prefers another token each time it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, input_ids, scores):
        self.asked += 1
        liked = torch.arange(scores.shape[1]) % 5 == self.asked % 5
        return scores + liked * 6.0


class Following(LogitsProcessor):
    """A state for each row that follows what the row said."""

    def __init__(self):
        self.states: list[int] | None = None

    def __call__(self, input_ids, scores):
        if self.states is None:
            self.states = [0] * len(input_ids)
        else:
            said = input_ids[:, -1].tolist()
            self.states = [(3 * state + token + 1) % 11 for state, token in zip(self.states, said, strict=True)]
        liked = torch.arange(scores.shape[1])[None] % 11 == torch.tensor(self.states)[:, None]
        return scores + liked * 8.0


class Strict(Following):
    """A grammar: forbids by a state for each row, and raises for a text that has said what was forbidden."""

    def __call__(self, input_ids, scores):
        for state, last in zip(self.states or [], input_ids[:, -1].tolist(), strict=False):
            assert last in (PAD, BOS) or last % 11 != state, f"{last} was forbidden"
        super().__call__(input_ids, scores)
        forbidden = torch.arange(scores.shape[1])[None] % 11 == torch.tensor(self.states)[:, None]
        return scores.masked_fill(forbidden, -torch.inf)


PROCESSORS = {
    "in place": lambda batch_size: InPlace(),
    "function": lambda batch_size: by_last_token,
    "per place": PerPlace,
    "counting": lambda batch_size: Counting(),
    "following": lambda batch_size: Following(),
    "strict": lambda batch_size: Strict(),
}


class PerRow(StoppingCriteria):
    """Ends each place of the batch at a length of its own, or when it has said a token of the place's own kind."""

    def __init__(self, lengths: list[int], kinds: list[int]):
        self.lengths, self.kinds = torch.tensor(lengths), torch.tensor(kinds)
        self.has_said = torch.zeros(len(kinds), dtype=torch.bool)

    def __call__(self, input_ids, scores, **settings):
        self.has_said |= input_ids[:, -1] % 13 == self.kinds
        return (input_ids.shape[1] >= self.lengths) | self.has_said


# --- a case


@dataclass
class Case:
    """One request. ``turns``: how often it is asked, each time about the text so far and more, with one kept cache."""

    seed: int
    family: str
    decoder: Any
    lengths: list[int]
    extra_padding: int
    settings: dict[str, Any]
    processors: list[str]
    criterion: tuple[list[int], list[int]] | None
    turns: int
    streams: bool
    repeats: bool

    def inputs(self) -> dict[str, torch.Tensor]:
        """The prompts, padded on the left; where the case ``repeats`` they say the same few tokens again."""
        generator = torch.Generator().manual_seed(self.seed)
        width = max(self.lengths) + self.extra_padding
        input_ids = torch.full((len(self.lengths), width), PAD)
        mask = torch.zeros_like(input_ids)
        for row, length in enumerate(self.lengths):
            words = torch.randint(3, MASK, (3 if self.repeats else length,), generator=generator)
            input_ids[row, width - length :] = words.repeat(length)[:length]
            mask[row, width - length :] = 1
        return {"input_ids": input_ids, "attention_mask": mask}

    def arguments(self, tokenizer, **changes) -> dict[str, Any]:
        """Arguments of ``generate``, with processors and criteria that nobody has asked yet."""
        arguments = {**self.settings, **changes}
        if "stop_strings" in arguments:
            arguments["tokenizer"] = tokenizer
        if self.processors:
            arguments["logits_processor"] = [PROCESSORS[name](len(self.lengths)) for name in self.processors]
        if self.criterion:
            arguments["stopping_criteria"] = [PerRow(*self.criterion)]
        return arguments


def make(seed: int, kind: str) -> Case:
    """The case of ``seed`` for the decoder called ``kind``."""
    pick = random.Random(f"{seed} {kind}")
    batch_size = pick.choice([1, 1, 2, 3, 4])
    lengths = [pick.randint(1, 14) for _ in range(batch_size)]
    if pick.random() < 0.3:
        lengths = lengths[:1] * batch_size
    settings = {"max_new_tokens": pick.randint(1, 18), "pad_token_id": PAD, "suppress_tokens": [MASK]}
    if pick.random() < 0.3:
        settings["suppress_tokens"] = [MASK, *pick.sample(TOKENS, 30)]
    # None at all, one that seldom comes, and others.
    settings["eos_token_id"] = pick.choice([None, BOS, pick.choice(TOKENS), pick.sample(TOKENS, pick.choice([3, 12]))])
    share = pick.choice([0.05, 0.2])
    narrow = kind == "sbd" and pick.random() < 0.7  # else nearly all of its cases would be refused
    asked = [name for name in SETTINGS if pick.random() < share and (not narrow or name in INSIDE_BLOCKS)]
    settings |= {name: SETTINGS[name](pick) for name in asked}
    if settings["eos_token_id"] is None:  # which this one counts down to
        settings.pop("exponential_decay_length_penalty", None)
    if settings.get("forced_eos_token_id") in settings["suppress_tokens"]:  # generate refuses that
        settings["suppress_tokens"].remove(settings["forced_eos_token_id"])
    width = max(lengths) + (extra := pick.choice([0, 0, 3]))
    criterion = None
    if pick.random() < 0.25:
        ends = [width + pick.randint(1, 16) for _ in lengths]
        criterion = ends, [pick.randrange(13) for _ in lengths]
    alone = batch_size == 1
    turns = pick.choice([1, 2, 3]) if alone and not extra else 1
    if "prefix_allowed_tokens_fn" in settings and turns == 1:
        settings["prefix_allowed_tokens_fn"].width = width
    return Case(
        seed,
        pick.choice(list(FAMILIES)),
        DECODERS[kind](pick),
        lengths,
        extra,
        settings,
        [] if narrow else pick.sample(list(PROCESSORS), pick.choice([0, 0, 0, 1, 1, 2])),
        criterion,
        turns,
        alone and pick.random() < 0.5,
        pick.random() < 0.4,
    )
