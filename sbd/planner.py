"""How many drafts to verify, and for which acceptance lengths to prepare the next draft."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from decoding.batch import Sequence
from sbd.acceptance import AcceptanceTable


@dataclass
class Draft:
    """Tokens that wait to be verified.

    confidences: largest probability of each draft's law. hidden: [M, D] states whose head gives those laws again, or None
    if the drafts were not drawn from laws. kind: "mask" or "lookup".
    """

    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    hidden: Tensor | None = None
    kind: Literal["mask", "lookup"] = "mask"

    def shortened(self, count: int) -> "Draft":
        hidden = None if self.hidden is None else self.hidden[:count]
        return Draft(self.tokens[:count], self.confidences[:count], hidden, self.kind)


class Planner:
    """Chooses the rows of a self-speculating forward as ``look_ahead`` says; keeps estimates of acceptance."""

    def __init__(self, block_size: int, look_ahead: str | int, has_masks: bool):
        self.block_size = block_size
        self.look_ahead = look_ahead
        self.has_masks = has_masks
        self.tables = {kind: AcceptanceTable(block_size - 1) for kind in ("mask", "lookup")}

    def record(self, draft: Draft, accepted: int) -> None:
        """Learn how many tokens of a draft are those of the text."""
        self.tables[draft.kind].record(draft.confidences, accepted)

    def expected(self, draft: Draft) -> float:
        """How many tokens of a draft will be accepted, by the running estimates."""
        return sum(a * p for a, p in enumerate(self.tables[draft.kind].lengths(draft.confidences)))

    def choose(self, sequence: Sequence, draft: Draft) -> tuple[int, tuple[int, ...]]:
        """How many drafts to verify, and the acceptance lengths to provide for, ascending.

        The number of drafts depends on their laws alone, never on their values, as the ratio test asks.
        """
        drafts = min(len(draft.tokens), sequence.room - 1)
        if not self.has_masks:
            return drafts, ()
        if drafts == 0:
            return 0, (0,)
        if self.look_ahead == "all":
            return drafts, tuple(range(drafts + 1))
        if self.look_ahead == "alternate":
            return drafts, ()
        if self.look_ahead == 0:
            return drafts, (drafts,)
        law = self.tables[draft.kind].lengths(draft.confidences[:drafts])
        return drafts, likeliest(law, self.look_ahead)


def likeliest(law: list[float], count: int) -> tuple[int, ...]:
    """The ``count`` likeliest acceptance lengths, ascending.

    >>> likeliest([0.2, 0.1, 0.4, 0.3], 2)
    (2, 3)
    """
    return tuple(sorted(sorted(range(len(law)), key=law.__getitem__, reverse=True)[:count]))
