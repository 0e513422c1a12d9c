"""Plain next-token decoding: the baseline of every benchmark and the reference of every equality test."""

from dataclasses import dataclass

from decoding.batch import Batch
from decoding.decoder import Decoder
from decoding.forward.model import RowLogits
from decoding.forward.rows import RowList


@dataclass(frozen=True)
class NextTokenDecoder(Decoder):
    """One token per forward: the pending token runs as a causal row and its law gives the next one."""

    gives_logprobs = True

    def plan(self, batch: Batch) -> list[RowList]:
        lists = []
        for sequence in batch.unfinished:
            rows = RowList()
            rows.add_causal(sequence.pending, sequence.cached)
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, logits: RowLogits) -> None:
        sequences = batch.unfinished
        last = [len(sequence.pending) - 1 for sequence in sequences]
        raw = logits(range(len(sequences)), last)
        logprobs = raw.log_softmax(-1) if batch.wants_logprobs else None
        scores = batch.law.scores(raw, context=lambda i: sequences[i].left_of())
        tokens = batch.law.choose(scores, [sequence.generator for sequence in sequences]).tolist()
        for i, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence.cached = len(sequence.tokens)
            batch.commit(sequence, [token], logprobs=None if logprobs is None else [logprobs[i, token].item()])
