"""What set-block decoding remembers of a sequence between forwards: its open block, and the full one before it."""

from dataclasses import dataclass, field

from decoding.batch import Sequence


@dataclass
class FinishedBlock:
    """A block that is full but awaits its revision; all lists have one entry for each of its tokens.

    start: the position of its first token. rounds: how many revisions it has seen. first: the offset of the first token that
    may still be revised. ends: nothing follows it, because of an EOS or the token limit. rows: those of the running
    forward that the revision looks at.
    """

    start: int
    tokens: list[int]
    decided_at: list[int]
    revisions: list[int]
    ends: bool = False
    rounds: int = 0
    first: int = 0
    rows: list[int] = field(default_factory=list)

    def replace(self, offset: int, token: int, forward: int) -> None:
        self.tokens[offset] = token
        self.decided_at[offset] = forward
        self.revisions[offset] += 1

    def take_over(self, before: "FinishedBlock") -> None:
        """Go on counting where ``before`` was when it was masked again; an EOS may have made either the longer."""
        self.rounds = before.rounds
        for i, (old, new) in enumerate(zip(before.tokens, self.tokens, strict=False)):
            self.revisions[i] = before.revisions[i] + (old != new)


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
    def at(cls, start: int, size: int, mask_token_id: int) -> "OpenBlock":
        return cls(start, [mask_token_id] * size, [True] * size, [0] * size)

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
