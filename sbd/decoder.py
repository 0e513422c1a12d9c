"""Set Block Decoding: fill a block of masks in a few forwards, several tokens at a time.

Source: arXiv 2509.04185, algorithms 2 and 3. The finished block runs causally together with the first forward of the
next block, so the key/value cache is exact and the commit costs rows, not a forward. Plain SBD is lossy: tokens
revealed together are drawn independently.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from decoding.batch import Batch, Sequence
from decoding.decoder import Decoder
from decoding.engine import Step
from decoding.forward.rows import RowList
from decoding.forward.transfer import to_device
from decoding.inputs.checks import check_choice, check_count, warn_untrained_size
from decoding.revision import Revision
from decoding.rules import EntropyBound, RevealRule, RowScores
from decoding.sampling import LogitsPipeline
from sbd.revision import await_revision, settle
from sbd.state import OpenBlock


@dataclass(frozen=True)
class SetBlockDecoder(Decoder):
    """Decode blocks of ``block_size`` masks; ``rule`` decides what each forward reveals.

    anchor: the forward that opens a block also commits the token before it, whose row gives the exact next-token distribution
        of the block's first position. With True that token is chosen from this distribution and revealed first; EntropyBound
        does not charge for it, TopK and ConfidenceFactor count it like any other.
        A block of one is always anchored: it is next-token decoding.
    commit: run decided tokens causally when the "block" is full (paper), or their gapless "prefix" with the next
        forward. Then every forward has an anchor: the undecided token that stands first is chosen from its next-token
        distribution, and only tokens behind it are guessed.
    revision: what to do about a full block before it is committed: nothing, sbd.Remask, rpt.Resample or another Revision.
    entropy_from: when sampling, measure the rule's scores on the distribution that is "sampled", after temperature and cuts, or
        on the "raw" one. Greedy decoding always uses the raw one.
    mask_token_id: by default the one that the model's generation config names.

    Source: arXiv 2509.04185, algorithms 2 and 3; defaults of its section 4 for reasoning tasks.
    """

    block_size: int = 16
    rule: RevealRule = field(default_factory=EntropyBound)
    anchor: bool = False
    commit: Literal["block", "prefix"] = "block"
    revision: Revision | None = None
    entropy_from: Literal["sampled", "raw"] = "sampled"
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        check_choice("anchor", self.anchor, (True, False))
        check_choice("commit", self.commit, ("block", "prefix"))
        check_choice("entropy_from", self.entropy_from, ("sampled", "raw"))
        if not isinstance(self.rule, RevealRule):
            raise ValueError(
                f"rule must be EntropyBound, ConfidenceThreshold, ConfidenceFactor, TopK or a RevealRule of your own, "
                f"got {self.rule!r}"
            )
        if self.revision is not None and not isinstance(self.revision, Revision):
            raise ValueError(
                f"revision must be None, Resample or Remask or a Revision of your own, got {self.revision!r}"
            )
        if self.revision is not None and self.commit == "prefix":
            raise ValueError("commit must be 'block' with a revision, which looks at full blocks, got 'prefix'")

    @property
    def needs_mask_token(self) -> bool:
        return True

    def check(self, model: Any, pipeline: LogitsPipeline) -> None:
        pipeline.check_holes(type(self).__name__)
        if self.revision is not None:
            self.revision.check(model)
        warn_untrained_size(model, self.block_size)

    def plan(self, batch: Batch) -> list[RowList]:
        lists = []
        for sequence in batch.unfinished:
            if sequence.state is None:
                sequence.state = OpenBlock.at(len(sequence.tokens), batch.masks(self.block_size))
            block, rows = sequence.state, RowList()
            text, start = sequence.tokens, sequence.cached
            if block.finished is not None:  # its revision looks at the row before it, too
                text, start = text + block.finished.tokens, min(start, block.finished.start - 1)
            block.causal = rows.add_causal(text[start : block.start], start)
            block.rows = rows.add_block(block.tokens, block.start, block.start)
            if block.finished is not None and self.revision is not None:
                judged = block.causal[-1 - len(block.finished.tokens) :]
                block.finished.rows = self.revision.add_rows(rows, judged, batch, sequence, block.finished)
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, step: Step) -> None:
        sequences, size = step.sequences, self.block_size
        settled = [settle(self.revision, batch, step, index) for index in range(len(sequences))]
        blocks: list[OpenBlock] = [sequence.state for sequence in sequences]
        masked = torch.tensor([block.masked + [False] * (size - len(block.masked)) for block in blocks])
        masked &= torch.tensor(settled)[:, None]
        if not masked.any():
            return
        anchored = torch.zeros_like(masked)
        if self.anchor or size == 1:  # where the token before the first mask is committed by this forward
            anchored[:, 0] = masked[:, 0] & torch.tensor([len(block.causal) > 0 for block in blocks])
        scores, tokens = self._decide(batch, step, masked, anchored)

        device = tokens.device
        where = to_device(masked, device)
        reveal = self.rule(_spread(scores, where), where, to_device(anchored, device))
        tokens = torch.zeros_like(where, dtype=torch.long).masked_scatter(where, tokens)
        reveals, decided = torch.stack([reveal.long(), tokens]).tolist()  # one copy to the host
        for sequence, ready, chosen, token in zip(sequences, settled, reveals, decided, strict=True):
            if not ready:
                continue
            block: OpenBlock = sequence.state
            sequence.cached = block.start
            batch.check_decided(sequence, [t for t, is_chosen in zip(token, chosen, strict=True) if is_chosen])
            for offset in range(len(block.masked)):
                if chosen[offset]:
                    block.tokens[offset] = token[offset]
                    block.masked[offset] = False
                    block.decided_at[offset] = sequence.forwards
            if self.revision is None:
                self._commit_prefix(batch, sequence)
            else:
                await_revision(self.revision, batch, sequence, self.block_size)

    def preview(self, batch: Batch) -> list[int] | None:
        sequence = batch.sequences[0]
        return sequence.state.uncommitted(sequence) if sequence.state else None

    def _decide(self, batch: Batch, step: Step, masked: Tensor, anchored: Tensor) -> tuple[RowScores, Tensor]:
        """Scores and tokens, [N], of the ``masked`` [B, Q] rows; an ``anchored`` one is decided by the row before the block."""
        pipeline, sequences = batch.pipeline, step.sequences
        spans, asked = [], []
        for index, (sequence, offsets) in enumerate(zip(sequences, masked.tolist(), strict=True)):
            block: OpenBlock = sequence.state
            wanted = [offset for offset, is_masked in enumerate(offsets) if is_masked]
            rows = [block.causal[-1] if anchored[index, offset] else block.rows[offset] for offset in wanted]
            spans.append((index, rows))
            asked += [(sequence, offset) for offset in wanted]
        raw = step.logits(spans)

        def left_of(i: int) -> tuple[int, list[int]]:
            sequence, offset = asked[i]
            return sequence.left_of(sequence.state.uncommitted(sequence, offset))

        if pipeline.do_sample and self.entropy_from == "raw":
            raw[:, pipeline.forbidden] = -torch.inf
            scores = RowScores.of(raw)
            processed = pipeline.process(raw, left_of)
        else:
            processed = pipeline.process(raw, left_of)
            scores = RowScores.of(processed)
        return scores, pipeline.sample(processed, [sequence.generator for sequence, _ in asked])

    def _commit_prefix(self, batch: Batch, sequence: Sequence) -> None:
        """Make the gapless prefix of the block final; forget what will not run as block rows again."""
        block: OpenBlock = sequence.state
        done, prefix = len(sequence.tokens) - block.start, block.decided_prefix
        if prefix > done:
            batch.commit(sequence, block.tokens[done:prefix], block.decided_at[done:prefix])
        if prefix == len(block.masked):
            sequence.state = None
        elif self.commit == "prefix":
            sequence.state = block.without(prefix)


def _spread(scores: RowScores, masked: Tensor) -> RowScores:
    """Scores [N] of the masked rows, put in their places [B, Q]; other rows get zeros, which no rule looks at."""

    def place(values: Tensor) -> Tensor:
        return torch.zeros(masked.shape, device=masked.device).masked_scatter(masked, values)

    return RowScores(place(scores.entropy), place(scores.confidence), place(scores.margin))
