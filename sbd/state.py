"""What set-block decoding remembers of a sequence between forwards: its open block, and what it was before."""

from dataclasses import dataclass

from decoding.batch import Sequence
from decoding.revision import FinishedBlock


@dataclass
class OpenBlock:
    """A partly decided block that begins at token ``start``; all lists have block_size entries.

    ``masked`` says what is undecided; ids are never compared with the mask token's. ``decided_at`` is the forward that
    decided each token, 0 while it is masked. ``rows`` are those of the block in the running forward, ``causal`` those of
    the text before it that runs with them. ``finished`` is the block before it while it awaits its revision; ``reopened``
    what this block was before a revision masked it again.
    """

    start: int
    tokens: list[int]
    masked: list[bool]
    decided_at: list[int]
    causal: range = range(0)
    rows: range = range(0)
    finished: FinishedBlock | None = None
    reopened: FinishedBlock | None = None

    @classmethod
    def at(cls, start: int, masks: list[int]) -> "OpenBlock":
        """A block of ``masks``, all undecided."""
        return cls(start, masks, [True] * len(masks), [0] * len(masks))

    def without(self, count: int) -> "OpenBlock":
        """The block that is left when its first ``count`` tokens are committed."""
        return OpenBlock(self.start + count, self.tokens[count:], self.masked[count:], self.decided_at[count:])

    @property
    def decided_prefix(self) -> int:
        """How many tokens from the start of the block are decided without a gap."""
        return self.masked.index(True) if True in self.masked else len(self.masked)

    def uncommitted(self, sequence: Sequence, offset: int | None = None) -> list[int]:
        """What stands between the committed tokens of its sequence and ``offset``, by default its end."""
        if self.finished is not None:
            return self.finished.tokens + self.tokens[:offset]
        return self.tokens[len(sequence.tokens) - self.start : offset]
