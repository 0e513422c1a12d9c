"""Plain next-token decoding: the baseline of every benchmark and the reference of every equality test."""

from dataclasses import dataclass

from torch import Tensor

from decoding.batch import Batch
from decoding.decoder import Decoder
from decoding.engine import Step
from decoding.forward.rows import RowList
from decoding.forward.transfer import to_device
from decoding.sampling import of_tokens


@dataclass(frozen=True)
class NextTokenDecoder(Decoder):
    """One token per forward: the pending token runs as a causal row, which decides the next one."""

    @property
    def gives_logprobs(self) -> bool:
        return True

    @property
    def is_lossless(self) -> bool:
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
        scores = self._process(batch, step, raw)
        chosen = batch.pipeline.sample(scores, [sequence.generator for sequence in sequences])
        known = None if logprobs is None else of_tokens(logprobs, chosen).tolist()
        sampled = of_tokens(scores.log_softmax(-1), chosen).tolist() if batch.wants_sampled_logprobs else None
        for sequence in sequences:
            sequence.cached = len(sequence.tokens)
        batch.commit_together(sequences, chosen.tolist(), known, sampled)

    def _process(self, batch: Batch, step: Step, raw: Tensor) -> Tensor:
        """Processors that look at the text are asked once a step about the whole batch, so they may keep a state."""
        if not batch.pipeline.needs_context:
            return batch.pipeline.process(raw)
        rows = to_device([sequence.index for sequence in step.sequences], raw.device)
        logits = raw.new_zeros(len(batch.sequences), raw.shape[-1]).index_copy(0, rows, raw)
        return batch.pipeline.process_together(logits, batch.texts(raw.device))[rows]
