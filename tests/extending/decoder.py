"""A decoder of one's own: next-token decoding that takes no token before a second forward has confirmed it."""

from dataclasses import dataclass

from decoding import Batch, Decoder, RowList, Step
from decoding.inputs.checks import check_count


@dataclass(frozen=True)
class Patient(Decoder):
    """Emits the token that the last row found likeliest in ``looks`` forwards; all the others are wasted."""

    looks: int = 2

    def __post_init__(self):
        check_count("looks", self.looks)

    def plan(self, batch: Batch) -> list[RowList]:
        lists = []
        for sequence in batch.unfinished:
            rows = RowList()
            seen = sequence.state[0] if sequence.state else 0
            sequence.state = seen, rows.add_causal(sequence.pending, sequence.cached)[-1:]
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, step: Step) -> None:
        logits = step.logits((i, sequence.state[1]) for i, sequence in enumerate(step.sequences))
        for sequence, token in zip(step.sequences, logits.argmax(-1).tolist(), strict=True):
            seen, rows = sequence.state
            sequence.state = (seen + 1) % self.looks, rows
            if seen + 1 == self.looks:
                sequence.cached = len(sequence.tokens)
                batch.commit(sequence, [token])
