"""Previous-token rows as the revision of a full block, for decoders that fill blocks."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from decoding.batch import Batch, Sequence
from decoding.engine import Step
from decoding.forward.rows import RowList
from decoding.inputs.checks import check_choice
from decoding.revision import FinishedBlock, Revision
from rpt.config import ResampleConfig, check_resampling
from rpt.previous_rows import AcceptRule, add_previous_rows


@dataclass(frozen=True)
class Resample(Revision):
    """Predict each token of the block from those before it and the one after it (Resample-Previous-Tokens, 2506.06215).

    For each token i but the last the forward holds rows as in :func:`rpt.previous_rows.add_previous_rows`; the model
    must be trained for them (window 2). policy: of the changes that the accept rule wants, take all that are not neighbours
    of one taken ("nonadjacent"), in one round; or the "leftmost", and look again at what follows it.
    accept, threshold, temperature_ptp: see :class:`rpt.previous_rows.AcceptRule`.
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

    def check(self, model: PreTrainedModel) -> None:
        check_resampling(model, 2)

    def is_done(self, block: FinishedBlock) -> bool:
        return block.first >= len(block.tokens) - 1 or (self.policy == "nonadjacent" and block.rounds > 0)

    def add_rows(
        self, rows: RowList, causal: range, batch: Batch, sequence: Sequence, block: FinishedBlock
    ) -> list[int]:
        assert batch.config is not None
        config = ResampleConfig.from_config(batch.config)
        text, slot, judges = sequence.tokens + block.tokens, max(rows.slots) + 1, []
        for offset in range(block.first, len(block.tokens) - 1):
            added = add_previous_rows(rows, text, block.start + offset, 2, config, slot, config.prev_target == "follow")
            slot += len(added)
            judges.append(added[-1])
        return judges

    def revise(self, batch: Batch, step: Step, index: int, block: FinishedBlock) -> bool:
        sequence = step.sequences[index]
        old = block.tokens[block.first : -1]
        offsets = range(block.first, block.first + len(old))
        raw = step.logits([(index, block.rows)])
        new = self.accept_rule(
            batch.pipeline,
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
