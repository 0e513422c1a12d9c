"""Where drafts come from. A new source is a class with ``name`` and ``propose``; the decoder is given the class."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from decoding.inputs.checks import check_named, named_object
from sbd.lossless.drawing import Candidates


@dataclass
class Draft:
    """Tokens that wait to be verified.

    confidences: how likely each is to be accepted if those before it are, a first guess that is soon corrected by what is
        seen; for mask rows the largest probability of the row.
    hidden: [M, D] states whose head gives the distributions that the tokens were drawn from, independently; None for
        tokens that come from anywhere else.
    candidates: the distributions that they were drawn from one after the other, where each depends on the tokens before it.
    source: name of the DraftSource.
    """

    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    hidden: Tensor | None = None
    source: str = "mask"
    candidates: Candidates | None = None

    @property
    def known_confidences(self) -> list[float]:
        """Those that do not depend on what was drawn from the distributions of this draft."""
        return self.confidences if self.candidates is None else self.confidences[:1]

    def shortened(self, count: int) -> "Draft":
        hidden = None if self.hidden is None or not count else self.hidden[:count]
        candidates = None if self.candidates is None or not count else self.candidates[:count]
        return Draft(self.tokens[:count], self.confidences[:count], hidden, self.source, candidates)


class DraftSource(Protocol):
    """Proposes drafts for one sequence; the decoder makes one of each kind for each sequence, without arguments.

    What is emitted does not depend on the proposals, only how soon: they may come from anywhere, as long as they depend
    on nothing but the text.
    """

    name: str

    def propose(self, tokens: list[int], count: int) -> Draft:
        """Up to ``count`` tokens that may follow the text ``tokens``; called once before each forward."""
        ...


class MaskDrafts:
    """What the mask rows of the last forward drafted for the acceptance length that came true."""

    name = "mask"

    def __init__(self) -> None:
        self.draft = Draft()

    def propose(self, tokens: list[int], count: int) -> Draft:
        return self.draft


class PromptLookup:
    """What followed the last few tokens when they occurred before; remembers where every short run last occurred.

    Source: prompt lookup decoding, as in transformers' ``prompt_lookup_num_tokens``.
    """

    name = "prompt_lookup"
    CONFIDENCE = (0.0, 0.3, 0.5, 0.7)  # for known runs of 0 to 3 tokens

    def __init__(self, longest: int = 3):
        self.longest = longest
        self._seen: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: list[int], count: int) -> Draft:
        found, length = self.find(tokens, count)
        return Draft(found, [self.CONFIDENCE[min(length, 3)]] * len(found), source=self.name)

    def find(self, tokens: list[int], count: int) -> tuple[list[int], int]:
        """The ``count`` tokens that followed the longest known run that ends ``tokens``, and the length of that run.

        Where the text ends before there are so many it is taken to go round: what repeats itself goes on doing so.
        ``([], 0)`` if no run is known.
        """
        # A run that ends the text has no continuation yet, so only runs before the last token are indexed.
        for end in range(self._indexed + 1, len(tokens)):
            for length in range(1, min(self.longest, end) + 1):
                self._seen[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for length in range(min(self.longest, len(tokens)), 0, -1):
            begins = self._seen.get(tuple(tokens[-length:]))
            if begins is not None:
                followed = tokens[begins : begins + count]
                return [followed[i % len(followed)] for i in range(count)], length
        return [], 0


SOURCES: dict[str, tuple[Callable[[], DraftSource], ...]] = {
    "mask": (MaskDrafts,),
    "prompt_lookup": (PromptLookup,),
    "both": (MaskDrafts, PromptLookup),
}


def draft_sources(draft: str | Callable[[], DraftSource]) -> tuple[Callable[[], DraftSource], ...]:
    """What makes the sources that ``draft`` asks for: a name, "module:Class" of one's own, or the class itself.

    Names joined by "+" are asked together: "mask+module:Class". Raises ValueError for what is none of these.
    """
    if callable(draft):
        return (draft,)
    check_named("draft", draft, SOURCES)
    makers = (SOURCES.get(name) or (named_object("draft", name),) for name in draft.split("+"))
    return tuple(maker for several in makers for maker in several)
