"""Second thoughts about a full block before it is committed: resample its tokens, or mask some again and refill.

A finished block has to run causally once, together with the first forward of the next block. A revision looks at that
forward; where it changes the block, the block and the next one's first forward run again.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import inf
from typing import Literal

from decoding.batch import Batch, Sequence
from decoding.checks import check_choice, check_count, check_range
from decoding.engine import Step
from decoding.forward.rows import RowList
from decoding.previous import AcceptRule, ResampleConfig, add_previous_rows
from sbd.state import FinishedBlock, OpenBlock


@dataclass(frozen=True)
class Resample:
    """Predict each token of the block from those before it and the one after it (Resample-Previous-Tokens, 2506.06215).

    For each token i but the last the forward holds rows as in :func:`decoding.previous.add_previous_rows`; the model must
    be trained for them (window 2). policy: of the changes that the accept rule wants, take all that are not neighbours
    of one taken ("nonadjacent"), in one round; or the "leftmost", and look again at what follows it.
    accept, threshold, temperature_ptp: see :class:`decoding.previous.AcceptRule`.
    """

    policy: Literal["nonadjacent", "leftmost"] = "nonadjacent"
    accept: Literal["gibbs", "argmax_threshold"] = "argmax_threshold"
    threshold: float = 0.9
    temperature_ptp: float | None = None

    def __post_init__(self):
        check_choice("policy", self.policy, ("nonadjacent", "leftmost"))
        _ = self.accept_rule

    @property
    def accept_rule(self) -> AcceptRule:
        return AcceptRule(self.accept, self.threshold, self.temperature_ptp)

    def is_done(self, block: FinishedBlock) -> bool:
        return block.first >= len(block.tokens) - 1 or (self.policy == "nonadjacent" and block.rounds > 0)

    def add_rows(self, rows: RowList, batch: Batch, sequence: Sequence, block: FinishedBlock) -> None:
        """Add the rows that judge the block behind its causal ones; their indices go to ``block.rows``."""
        config = ResampleConfig.of(batch.config)
        text, slot, block.rows = sequence.tokens + block.tokens, max(rows.slots) + 1, []
        for offset in range(block.first, len(block.tokens) - 1):
            added = add_previous_rows(rows, text, block.start + offset, 2, config, slot, config.prev_target == "follow")
            slot += len(added)
            block.rows.append(added[-1])

    def revise(self, batch: Batch, step: Step, index: int, block: FinishedBlock) -> bool:
        """Change the block as its rows say; True if it changed."""
        sequence = step.sequences[index]
        old = block.tokens[block.first : -1]
        offsets = range(block.first, block.first + len(old))
        raw = step.logits([(index, block.rows)])
        new = self.accept_rule(
            batch.law,
            raw,
            old,
            lambda row: sequence.left_of(block.tokens[: block.first + row]),
            [sequence.generator] * len(old),
        ).tolist()
        wanted = [offset for offset, was, now in zip(offsets, old, new, strict=True) if was != now]
        taken = wanted[:1] if self.policy == "leftmost" else _without_neighbours(wanted)
        for offset in taken:
            block.replace(offset, new[offset - offsets.start], sequence.forwards)
        block.rounds += 1
        if self.policy == "leftmost":
            block.first = taken[0] + 1 if taken else len(block.tokens)
        return bool(taken)

    def reopens(self, block: FinishedBlock) -> list[int]:
        return []


@dataclass(frozen=True)
class Remask:
    """Mask the tokens again that the next-token law finds unlikely, and refill them from the rest of the block.

    The block's causal rows give p(x_i | x_<i) of each of its tokens for nothing; those below ``remask_below`` are masked,
    the reveal rule fills them again, at most ``rounds`` times. Cheap relatives: ReMDM (arXiv 2503.00307), whose
    confidence is that of the masked law, and the editing of LLaDA2.1 (arXiv 2602.08676).
    """

    remask_below: float = 0.1
    rounds: int = 1

    def __post_init__(self):
        check_range("remask_below", self.remask_below, 0, 1)
        check_count("rounds", self.rounds)

    def is_done(self, block: FinishedBlock) -> bool:
        return block.rounds >= self.rounds

    def add_rows(self, rows: RowList, batch: Batch, sequence: Sequence, block: FinishedBlock) -> None:
        """Only notes which rows it will look at: those before the tokens, the causal rows of the block among them."""
        first = rows.positions.index(block.start - 1)
        block.rows = list(range(first, first + len(block.tokens)))

    def revise(self, batch: Batch, step: Step, index: int, block: FinishedBlock) -> bool:
        """Note what is to be masked again; True if anything is."""
        raw = step.logits([(index, block.rows)])
        raw[:, batch.law.forbidden] = -inf
        likely = raw.softmax(-1)[range(len(block.rows)), block.tokens]
        block.rounds += 1
        block.rows = (likely < self.remask_below).nonzero().flatten().tolist()
        return bool(block.rows)

    def reopens(self, block: FinishedBlock) -> list[int]:
        """Offsets of the tokens that are masked again."""
        return block.rows


Revision = Resample | Remask


def await_revision(revision: Revision, batch: Batch, sequence: Sequence, block_size: int) -> None:
    """If the open block is full, or decided up to an EOS or the limit, let it wait for its revision and open the next."""
    block: OpenBlock = sequence.state
    prefix = min(block.decided_prefix, sequence.room)
    tokens = block.tokens[:prefix]
    stop = next((i + 1 for i, token in enumerate(tokens) if token in batch.stopping.eos_token_ids), None)
    ends = stop is not None or prefix == sequence.room
    if not ends and prefix < len(block.masked):
        return
    tokens = tokens[:stop]
    finished = FinishedBlock(block.start, tokens, block.decided_at[: len(tokens)], [0] * len(tokens), ends)
    if block.reopened is not None:
        finished.take_over(block.reopened)
    size = 0 if ends else block_size
    sequence.state = OpenBlock.at(block.start + len(tokens), size, batch.mask_token_id)
    if revision.is_done(finished):
        batch.commit(sequence, tokens, finished.decided_at, revisions=finished.revisions)
    else:
        sequence.state.finished = finished


def settle(revision: Revision | None, batch: Batch, step: Step, index: int) -> bool:
    """Revise the finished block, if there is one; True if the open block's rows saw the text as it now stands."""
    sequence = step.sequences[index]
    block: OpenBlock = sequence.state
    finished = block.finished
    if finished is None or revision is None:
        return True
    sequence.cached = finished.start
    changed = revision.revise(batch, step, index, finished)
    reopened = revision.reopens(finished)
    if reopened:
        masks = [offset in reopened for offset in range(len(finished.tokens))]
        tokens = [batch.mask_token_id if m else t for m, t in zip(masks, finished.tokens, strict=True)]
        decided_at = [0 if m else at for m, at in zip(masks, finished.decided_at, strict=True)]
        sequence.state = OpenBlock(finished.start, tokens, masks, decided_at, reopened=finished)
    elif not changed or revision.is_done(finished):
        block.finished = None
        batch.commit(sequence, finished.tokens, finished.decided_at, revisions=finished.revisions)
        sequence.cached = finished.start if changed else len(sequence.tokens)
    return not changed and not sequence.finished


def _without_neighbours(offsets: SequenceOf[int]) -> list[int]:
    """From the left, those that do not stand beside one that was taken.

    >>> _without_neighbours([2, 3, 4, 7, 8])
    [2, 4, 7]
    """
    taken: list[int] = []
    for offset in offsets:
        if not taken or offset > taken[-1] + 1:
            taken.append(offset)
    return taken
