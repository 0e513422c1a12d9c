"""Plain next-token decoding: the baseline of every benchmark and the reference of every equality test."""

from dataclasses import dataclass

from decoding.batch import Batch
from decoding.decoder import Decoder
from decoding.engine import Step
from decoding.forward.rows import RowList


@dataclass(frozen=True)
class NextTokenDecoder(Decoder):
    """One token per forward: the pending token runs as a causal row, which decides the next one."""

    @property
    def gives_logprobs(self) -> bool:
        return True

    def plan(self, batch: Batch) -> list[RowList]:
        lists = []
        for sequence in batch.unfinished:
            rows = RowList()
            sequence.state = rows.add_causal(sequence.pending, sequence.cached)[-1:]
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, step: Step) -> None:
        sequences = step.sequences
        raw = step.logits((i, sequence.state) for i, sequence in enumerate(sequences))
        logprobs = raw.log_softmax(-1) if batch.wants_logprobs else None
        scores = batch.law.scores(raw, context=lambda i: sequences[i].left_of())
        chosen = batch.law.choose(scores, [sequence.generator for sequence in sequences])
        known = None if logprobs is None else logprobs.gather(-1, chosen[:, None]).tolist()
        for i, (sequence, token) in enumerate(zip(sequences, chosen.tolist(), strict=True)):
            sequence.cached = len(sequence.tokens)
            batch.commit(sequence, [token], logprobs=None if known is None else known[i])
