"""Second thoughts about a full block before it is committed: what a revision is.

A finished block has to run causally once, together with the first forward of the next block. A revision looks at that
forward; where it changes the block, the block and the next one's first forward run again.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from transformers import PreTrainedModel

from decoding.batch import Batch, Sequence
from decoding.engine import Step
from decoding.forward.rows import RowList


@dataclass
class FinishedBlock:
    """A block that is full but awaits its revision. ``tokens``, ``decided_at`` and ``revisions`` are those of Sequence.

    start: the position of its first token. ends: nothing follows it, because of an EOS or the token limit. rounds: how
    many revisions it has seen. first: the offset of the first token that may still be revised. rows: those of the
    running forward that the revision asked for. masked_again: offsets of the tokens that it wants decided anew.
    """

    start: int
    tokens: list[int]
    decided_at: list[int]
    revisions: list[int]
    ends: bool = False
    rounds: int = 0
    first: int = 0
    rows: SequenceOf[int] = ()
    masked_again: SequenceOf[int] = ()

    def replace(self, offset: int, token: int, forward: int) -> None:
        self.tokens[offset] = token
        self.decided_at[offset] = forward
        self.revisions[offset] += 1

    def take_over(self, before: "FinishedBlock") -> None:
        """Go on counting where ``before`` was when it was masked again; an EOS may have made either the longer."""
        self.rounds = before.rounds
        for i, (old, new) in enumerate(zip(before.tokens, self.tokens, strict=False)):
            self.revisions[i] = before.revisions[i] + (old != new)


class Revision(ABC):
    """Base of all revisions, which are frozen dataclasses of their settings."""

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if ``model`` cannot run the rows that this adds."""
        return

    @abstractmethod
    def is_done(self, block: FinishedBlock) -> bool:
        """Whether nothing is left to revise, so that the block is committed as it is."""

    @abstractmethod
    def add_rows(
        self, rows: RowList, causal: range, batch: Batch, sequence: Sequence, block: FinishedBlock
    ) -> SequenceOf[int]:
        """The rows that :meth:`revise` will look at: of those that are there, or more that are added to ``rows``.

        ``causal`` are those of the token before the block and of its own tokens: each predicts the token after it.
        """

    @abstractmethod
    def revise(self, batch: Batch, step: Step, index: int, block: FinishedBlock) -> bool:
        """Change the block of sequence ``index`` of ``step`` as its rows say; whether anything is changed.

        Tokens are put in their place (``block.replace``), or masked again for the decoder to fill (``block.masked_again``).
        """
