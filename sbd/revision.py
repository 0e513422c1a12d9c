"""Revisions in set-block decoding: masking some tokens of a full block again, and how a block waits for its revision."""

from dataclasses import dataclass
from math import inf

from decoding.batch import Batch, Sequence
from decoding.engine import Step
from decoding.forward.rows import RowList
from decoding.inputs.checks import check_count, check_range
from decoding.revision import FinishedBlock, Revision
from sbd.state import OpenBlock


@dataclass(frozen=True)
class Remask(Revision):
    """Mask the tokens again that the next-token distribution finds unlikely, and refill them from the rest of the block.

    The block's causal rows give p(x_i | x_<i) of each of its tokens for nothing; those below ``remask_below`` are masked,
    the reveal rule fills them again, at most ``rounds`` times. Cheap relatives: ReMDM (arXiv 2503.00307), whose
    confidence is that of the masked distribution, and the editing of LLaDA2.1 (arXiv 2602.08676).
    """

    remask_below: float = 0.1
    rounds: int = 1

    def __post_init__(self):
        check_range("remask_below", self.remask_below, 0, 1)
        check_count("rounds", self.rounds)

    def is_done(self, block: FinishedBlock) -> bool:
        return block.rounds >= self.rounds

    def add_rows(self, rows: RowList, causal: range, batch: Batch, sequence: Sequence, block: FinishedBlock) -> range:
        return causal[:-1]

    def revise(self, batch: Batch, step: Step, index: int, block: FinishedBlock) -> bool:
        raw = step.logits([(index, block.rows)])
        raw[:, batch.pipeline.forbidden] = -inf
        likely = raw.softmax(-1)[range(len(block.rows)), block.tokens]
        block.rounds += 1
        block.masked_again = (likely < self.remask_below).nonzero().flatten().tolist()
        return bool(block.masked_again)


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
    sequence.state = OpenBlock.at(block.start + len(tokens), batch.masks(size))
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
    if finished.masked_again:
        masks = [offset in finished.masked_again for offset in range(len(finished.tokens))]
        (mask,) = batch.masks(1)
        tokens = [mask if m else t for m, t in zip(masks, finished.tokens, strict=True)]
        decided_at = [0 if m else at for m, at in zip(masks, finished.decided_at, strict=True)]
        sequence.state = OpenBlock(finished.start, tokens, masks, decided_at, reopened=finished)
    elif not changed or revision.is_done(finished):
        block.finished = None
        batch.commit(sequence, finished.tokens, finished.decided_at, revisions=finished.revisions)
        sequence.cached = finished.start if changed else len(sequence.tokens)
    return not changed and not sequence.finished
