"""look_ahead="auto": the rows that pay best on this machine, down to none where drafting does not pay.

Each sequence is in one of two states: it holds a draft or it does not. With t(R) the seconds of a forward of R rows, k
the block size, M drafts, E[a] their expected accepted number and h the chance that the acceptance length is provided
for, a policy that drafts earns tokens at the rate

    (E[a] + 2 - h) / (t(1 + M + |S| k) + (1 - h) t(1 + k))

against 1 / t(1) for plain next-token rows. The best rate seen prices time; each forward then takes the number of
drafts and look-ahead blocks with the largest expected gain at that price.

Where drafting does not pay it is tried again after pauses that double. The pause outlives the text, so that a model
whose drafts are worth nothing does not pay for trials at the start of every short one.
"""

import time
from dataclasses import dataclass

from decoding.batch import Sequence
from decoding.engine import Engine
from sbd.lossless.drafts import Draft
from sbd.lossless.planner import Planner, likeliest

MARGIN = 1.05  # drafting must promise this much more than plain decoding
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # plain tokens between two trials once drafting does not pay
MEMORY = 0.9  # weight of the past in running means
UNTRIED = 1.0  # tokens that a mask draft is worth before any was seen, so that lookup does not keep masks from a trial


@dataclass
class Prospects:
    """Running means for one sequence: tokens accepted from a draft, and the share of lengths that s blocks cover."""

    accepted: float
    covered: list[float]
    pause: int = FIRST_PAUSE
    plain_left: int = 0


class AutoPlanner(Planner):
    """A Planner that weighs expected tokens against measured seconds."""

    def __init__(self, block_size: int, has_masks: bool, engine: Engine, batch_size: int = 1, shared: bool = True):
        super().__init__(block_size, "auto", has_masks, shared)
        self.costs = engine.row_costs(batch_size, block_size * (block_size + 1))
        self.times_itself = engine.recorded_costs is None
        # By batch size: the pause that texts have come to; none while drafts pay.
        self.pauses: dict[int, int] = engine.planner_memory.setdefault("pauses", {})
        self.batch_size = batch_size
        self.prospects: dict[int, Prospects] = {}
        self.overhead = 0.0  # seconds that deciding costs beyond what the cost curve holds, running mean
        self._planned: tuple[float, int] | None = None

    def choose(self, sequence: Sequence, draft: Draft) -> tuple[int, tuple[int, ...]]:
        self._learn_overhead()
        drafts, provided = self._choose(sequence, draft)
        rows = 1 + drafts + len(provided) * self.block_size
        if self.times_itself and len(sequence.pending) == 1 and rows > 1:
            self._planned = (time.perf_counter(), rows)
        return drafts, provided

    def _choose(self, sequence: Sequence, draft: Draft) -> tuple[int, tuple[int, ...]]:
        drafts = min(len(draft.tokens), sequence.room - 1)
        if drafts <= 0:
            return 0, (0,) if self.has_masks and self._worth_drafting(sequence) else ()
        lengths = self.table(sequence, draft.source).lengths(draft.confidences[:drafts])
        if draft.candidates is None:
            if draft.source == "mask":
                self._remember(sequence, lengths)
            price = self._price(sequence)
            count, blocks = self._best(price, lengths, 0, drafts)
        else:
            price = self._price(sequence)  # by earlier drafts
            count = self._stop(sequence, draft, drafts, price)
            _, blocks = self._best(price, lengths, count, count)
            self._remember(sequence, lengths)
        return count, likeliest(_cut(lengths, count), blocks)

    def _best(self, price: tuple[float, float], lengths: list[float], least: int, most: int) -> tuple[int, int]:
        """How many of ``least`` .. ``most`` drafts and how many blocks gain the most; no draft is one plain row."""
        rate, value = price
        best = (-rate * self.costs(1), 0, 0) if least == 0 else (-float("inf"), 0, 0)
        for count in range(max(1, least), most + 1):
            shorter = _cut(lengths, count)
            accepted = sum(a * p for a, p in enumerate(shorter))
            for blocks in range(count + 2 if self.has_masks else 1):
                covered = sum(shorter[a] for a in likeliest(shorter, blocks))
                seconds = self._seconds(1 + count + blocks * self.block_size)
                best = max(best, (accepted + covered * value - rate * seconds, count, blocks))
        return best[1:]

    def _stop(self, sequence: Sequence, draft: Draft, most: int, price: tuple[float, float]) -> int:
        """How many drafts to verify where each depends on those before it: stop before the first that is not worth it.

        What is known of draft j + 1 when that is decided is its distribution, given the drafts up to j; of later ones,
        what drafts of their offset did before.
        """
        table = self.table(sequence, draft.source)
        for count in range(most):
            lengths = table.lengths(draft.confidences[: count + 1], most)
            if self._best(price, lengths, count, most)[0] == count:
                return count
        return most

    def _price(self, sequence: Sequence) -> tuple[float, float]:
        """Tokens per second of the best policy, and what holding a mask draft is worth in tokens."""
        known, plain = self.prospects.get(sequence.index), 1 / self.costs(1)
        if known is None:
            return plain, UNTRIED
        drafting = self._rate(known)
        if not self.has_masks or drafting < MARGIN * plain:
            return plain, 0.0
        known.pause = FIRST_PAUSE
        self.pauses.pop(self.batch_size, None)
        return drafting, max(0.0, drafting * self._seconds(1 + self.block_size) - 1)

    def _remember(self, sequence: Sequence, lengths: list[float]) -> None:
        """Take the chances of the acceptance lengths of a mask draft into the running means."""
        ranked = sorted(lengths, reverse=True)
        covered = [sum(ranked[:s]) for s in range(len(ranked) + 1)]
        accepted = sum(a * p for a, p in enumerate(lengths))
        fresh = Prospects(accepted, covered, self.pauses.get(self.batch_size, FIRST_PAUSE))
        known = self.prospects.setdefault(sequence.index, fresh)
        if len(known.covered) == len(covered):  # a draft cut short by the token limit teaches nothing
            known.accepted = MEMORY * known.accepted + (1 - MEMORY) * accepted
            known.covered = [MEMORY * old + (1 - MEMORY) * new for old, new in zip(known.covered, covered, strict=True)]

    def _rate(self, known: Prospects) -> float:
        """Tokens per second of the best policy that drafts with masks."""
        size, drafts = self.block_size, self.block_size - 1
        draft_seconds = self._seconds(1 + size)
        return max(
            (known.accepted + 2 - h) / (self._seconds(1 + drafts + s * size) + (1 - h) * draft_seconds)
            for s, h in enumerate(known.covered)
        )

    def _worth_drafting(self, sequence: Sequence) -> bool:
        """Whether to spend a block of masks where there is no draft: yes if it pays, else now and then to see."""
        known = self.prospects.get(sequence.index)
        if known is None:
            return self.batch_size not in self.pauses or len(sequence.tokens) - sequence.prompt_length >= FIRST_PAUSE
        if self._rate(known) >= MARGIN / self.costs(1):
            return True
        if known.plain_left == 0:
            known.plain_left, known.pause = known.pause, min(LONGEST_PAUSE, 2 * known.pause)
            self.pauses[self.batch_size] = known.plain_left
        known.plain_left -= 1
        return known.plain_left == 0

    def _seconds(self, rows: int) -> float:
        return self.costs(rows) + self.overhead

    def _learn_overhead(self) -> None:
        if self._planned is not None:
            started, rows = self._planned
            extra = max(0.0, time.perf_counter() - started - self.costs(rows))
            # One slow moment of the machine must not look like the price of drafting.
            extra = min(extra, 2 * self.overhead + 0.5 * self.costs(1))
            self.overhead = MEMORY * self.overhead + (1 - MEMORY) * extra
            self._planned = None


def _cut(lengths: list[float], count: int) -> list[float]:
    """The chances of acceptance lengths if only ``count`` drafts are verified."""
    return [*lengths[:count], sum(lengths[count:])]
