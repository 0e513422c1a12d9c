"""How many drafts to verify, and for which acceptance lengths to prepare the next draft."""

from collections import defaultdict

from decoding.batch import Sequence
from sbd.lossless.acceptance import AcceptanceTable
from sbd.lossless.drafts import Draft
from sbd.lossless.drawing import DependentDrafter


class Planner:
    """Chooses the rows of a self-speculating forward as ``look_ahead`` says; keeps estimates of acceptance.

    ``shared``: estimates are learned from all sequences of a batch together. Where text is sampled, what is drawn depends
    on how many drafts there are, so each sequence learns alone: else its text would depend on the others.
    """

    def __init__(self, block_size: int, look_ahead: str | int, has_masks: bool, shared: bool = True):
        self.block_size = block_size
        self.look_ahead = look_ahead
        self.has_masks = has_masks
        self.shared = shared
        self.drafter: DependentDrafter | None = None  # of the run, where drafts depend on each other
        self._tables: dict[tuple[str, int], AcceptanceTable] = defaultdict(lambda: AcceptanceTable(block_size - 1))

    def table(self, sequence: Sequence, source: str) -> AcceptanceTable:
        """What is known of the drafts of ``source``."""
        return self._tables[source, 0 if self.shared else sequence.index]

    def record(self, sequence: Sequence, draft: Draft, accepted: int) -> None:
        """Learn how many tokens of a draft are those of the text."""
        self.table(sequence, draft.source).record(draft.confidences, accepted)

    def expected(self, sequence: Sequence, draft: Draft) -> float:
        """How many tokens of a draft will be accepted, by the running estimates; never by what was drawn for it."""
        lengths = self.table(sequence, draft.source).lengths(draft.known_confidences, len(draft.tokens))
        return sum(a * p for a, p in enumerate(lengths))

    def choose(self, sequence: Sequence, draft: Draft) -> tuple[int, tuple[int, ...]]:
        """How many drafts to verify, and the acceptance lengths to provide for, ascending.

        Whether draft j is verified may depend on its distribution and on all that was drawn before it, never on the token
        that was drawn for it or on anything later: else the ratio test would be biased. Independent drafts have
        distributions that depend on no draft, so theirs may all be looked at; where drafts depend on each other a stopping
        rule decides, from the left. The lengths that are provided for may depend on anything: what they give is verified
        by the next forward.
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
        lengths = self.table(sequence, draft.source).lengths(draft.confidences[:drafts])
        return drafts, likeliest(lengths, int(self.look_ahead))


def likeliest(probabilities: list[float], count: int) -> tuple[int, ...]:
    """The ``count`` likeliest acceptance lengths, ascending.

    >>> likeliest([0.2, 0.1, 0.4, 0.3], 2)
    (2, 3)
    """
    return tuple(sorted(sorted(range(len(probabilities)), key=probabilities.__getitem__, reverse=True)[:count]))
