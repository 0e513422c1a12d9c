"""From logits to tokens: transformers' logits processors, and draws that do not depend on the batch.

Shapes: N rows, V vocabulary. All decisions are made in float32, draws in float64.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as processors

from decoding.forward.transfer import to_device
from decoding.processors import (
    ProcessorCopies,
    ask,
    can_be_copied,
    for_one_place,
    is_foreign,
    keeps_state,
    looks_at_other_rows,
    may_refuse_text,
)

# These look at nothing but the logits, so many rows can be processed at once.
CONTEXT_FREE = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.TopHLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.SuppressTokensLogitsProcessor,
)
# These look at the tokens to the left, and mean something when some of those are still masked.
ALLOWS_HOLES = (
    processors.RepetitionPenaltyLogitsProcessor,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
)
# These keep a state that assumes one call for each emitted token.
STATEFUL = (
    processors.ClassifierFreeGuidanceLogitsProcessor,
    processors.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    processors.SynthIDTextWatermarkLogitsProcessor,
    processors.WatermarkLogitsProcessor,
)
NO_IDS: Any = None  # what processors that look at nothing but logits are given for the text
# Row -> (index of its sequence in the user's batch, the token ids to its left, padding included).
Context = Callable[[int], tuple[int, list[int]]]


@dataclass(frozen=True)
class LogitsPipeline:
    """From logits to tokens: the mask token ruled out, logits processors, then the likeliest token or a draw.

    ``forbidden`` is the mask token's id: it is never emitted, whatever its logit. ``batch_size`` is that of the user's
    batch, finished sequences included. ``copies``: by place in ``processors``, those that follow drafts with their state.
    ``particles``: sequences for each prompt, one prompt's after the other's. Processors that look at the text see one of
    each prompt at a time, since they may hold values for each prompt.
    """

    processors: LogitsProcessorList
    do_sample: bool
    forbidden: int | None = None
    batch_size: int = 1
    copies: dict[int, ProcessorCopies] = field(default_factory=dict)
    particles: int = 1

    def __post_init__(self) -> None:
        for processor in self.processors:
            if isinstance(processor, STATEFUL):
                raise ValueError(
                    f"{type(processor).__name__} keeps a state per emitted token and cannot be honoured here"
                )

    def check_holes(self, decoder_name: str) -> None:
        """Raise ValueError if a processor needs a left context without holes, which rows inside a block do not have."""
        for processor in self.processors:
            if not isinstance(processor, CONTEXT_FREE + ALLOWS_HOLES):
                raise ValueError(
                    f"{decoder_name} cannot honour {_named(processor)} inside a block, where the tokens to the left "
                    f"may be undecided; SelfSpeculativeDecoder and NextTokenDecoder can"
                )

    def check_stateless(self, decoder_name: str, vocab_size: int) -> None:
        """Raise ValueError if a processor keeps a state, which must not be asked about text that may change."""
        for _, processor in self._with_state(vocab_size):
            raise ValueError(
                f"{decoder_name} cannot honour {_named(processor)}, which keeps a state from token to token; "
                f"NextTokenDecoder can"
            )

    def follow_drafts(self, decoder_name: str, vocab_size: int) -> None:
        """Give every sequence copies of the processors that keep a state; ValueError for one that cannot be copied."""
        for place, processor in self._with_state(vocab_size):
            if not can_be_copied(processor, vocab_size, self.batch_size):
                raise ValueError(
                    f"{decoder_name} cannot honour {_named(processor)}: it keeps a state from token to token and "
                    f"cannot be copied, so rejected drafts could not be taken back; NextTokenDecoder can"
                )
            if looks_at_other_rows(processor, vocab_size, self.batch_size):
                raise ValueError(
                    f"{decoder_name} cannot honour {_named(processor)} in a batch: what it answers about a text depends on "
                    f"the texts beside it; decode one prompt at a time, or with NextTokenDecoder"
                )
            self.copies[place] = ProcessorCopies(processor)

    def commit(self, index: int, count: int) -> None:
        """The first ``count`` rows of sequence ``index`` that were last processed became tokens."""
        for copies in self.copies.values():
            copies.commit(index, count)

    def process(self, logits: Tensor, context: Context | None = None) -> Tensor:
        """Processed logits [N, V]. ``context(i)`` gives the sequence of row i and the token ids to its left.

        Without ``context`` only the processors that need none are applied. ``logits`` may be overwritten.
        """
        self._forbid(logits)
        for place, processor in enumerate(self.processors):
            if isinstance(processor, CONTEXT_FREE):
                logits = processor(NO_IDS, logits)
            elif context is not None:
                rows = [self._one_row(place, logits[i], *context(i)) for i in range(len(logits))]
                logits = torch.stack(rows)
        return logits

    def rule_out(self, logits: Tensor) -> Tensor:
        """Logits [N, V] with -inf at the tokens that are never emitted, whatever the text; may overwrite ``logits``."""
        self._forbid(logits)
        for processor in self.processors:
            if isinstance(processor, processors.SuppressTokensLogitsProcessor):
                logits = processor(NO_IDS, logits)
        return logits

    def process_values(self, logits: Tensor) -> Tensor:
        """Processed logits [N, C] of C tokens of any kind: by the processors that look at nothing but the numbers."""
        for processor in self.processors:
            if isinstance(processor, CONTEXT_FREE) and not isinstance(
                processor, processors.SuppressTokensLogitsProcessor
            ):
                logits = processor(NO_IDS, logits)
        return logits

    def process_drafts(self, logits: Tensor, context: Context, ends: Collection[int] = ()) -> Tensor:
        """Processed logits [N, V] of rows that verify drafts: a row's text is that of the row before and a draft for it.

        Rows behind a draft that cannot pass, or is among the tokens ``ends``, are never used. A processor that may refuse a
        text is not asked about them: a grammar need not bear what it forbids, or what follows its end.
        """
        if not any(may_refuse_text(processor) for processor in self.processors):
            return self.process(logits, context)
        self._forbid(logits)
        rows: list[Tensor] = []
        sequence, possible = None, True
        for i in range(len(logits)):
            index, left = context(i)
            follows = index == sequence
            possible = not follows or (possible and left[-1] not in ends and self._may_be(rows[-1], left[-1]))
            sequence = index
            rows.append(self._through_all(logits[i], index, left) if possible else logits[i])
        return torch.stack(rows)

    def process_together(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Processed logits [B, V] of all sequences' next tokens, given their texts ``ids`` [B, L], as ``generate`` does."""
        self._forbid(logits)
        for processor in self.processors:
            if self.particles == 1 or isinstance(processor, CONTEXT_FREE):
                logits = processor(ids, logits)
            else:
                ones = [slice(i, None, self.particles) for i in range(self.particles)]
                each = torch.stack([processor(ids[one], logits[one]) for one in ones], dim=1)
                logits = each.flatten(0, 1)
        return logits

    @property
    def needs_context(self) -> bool:
        """Whether a processor looks at the text."""
        return any(not isinstance(processor, CONTEXT_FREE) for processor in self.processors)

    def at_temperature(self, temperature: float) -> "LogitsPipeline":
        """The same as if ``generate`` had been asked for ``temperature``; all other processors as they are."""
        is_temperature = [isinstance(p, processors.TemperatureLogitsWarper) for p in self.processors]
        others = [p for p, drop in zip(self.processors, is_temperature, strict=True) if not drop]
        first = is_temperature.index(True) if True in is_temperature else len(others)
        own = processors.TemperatureLogitsWarper(float(temperature))
        return replace(self, processors=type(self.processors)([*others[:first], own, *others[first:]]))

    def sample(self, scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Tokens [N]: the likeliest, or drawn with row i's generator; -1 where nothing can be chosen (nan, or all -inf)."""
        if not self.do_sample:
            return likeliest(scores)
        return draw(scores.softmax(-1), generators)

    def _with_state(self, vocab_size: int) -> Iterator[tuple[int, LogitsProcessor]]:
        """The processors that keep a state, with their places."""
        for place, processor in enumerate(self.processors):
            if is_foreign(processor) and keeps_state(processor, vocab_size):
                yield place, processor

    def _forbid(self, logits: Tensor) -> None:
        if self.forbidden is not None:
            logits[:, self.forbidden] = -torch.inf

    def _through_all(self, logits: Tensor, index: int, left: list[int]) -> Tensor:
        for place, processor in enumerate(self.processors):
            if isinstance(processor, CONTEXT_FREE):
                logits = processor(NO_IDS, logits[None])[0]
            else:
                logits = self._one_row(place, logits, index, left)
        return logits

    def _one_row(self, place: int, logits: Tensor, index: int, left: list[int]) -> Tensor:
        ids, index = to_device(left, logits.device), index // self.particles
        if place in self.copies:
            return self.copies[place](index, ids, logits, self.batch_size)
        alone = for_one_place(self.processors[place], index, self.batch_size)
        if alone is not None:
            return ask(alone, ids, logits, 0, 1)
        return ask(self.processors[place], ids, logits, index, self.batch_size)

    def _may_be(self, scores: Tensor, draft: int) -> bool:
        """Whether ``draft`` can be what is chosen by ``scores`` [V]."""
        return bool(scores.softmax(-1)[draft] > 0 if self.do_sample else likeliest(scores) == draft)


def likeliest(scores: Tensor) -> Tensor:
    """Tokens [...] of the largest of ``scores`` [..., V]; -1 where that is nan or infinite, so that nothing is chosen."""
    value, token = scores.max(-1)
    return token.masked_fill_((value - value).isnan(), -1)  # as isfinite would, in half as many operations


def of_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """Of ``values`` [..., V] those of ``tokens`` [...]; any where a token is below 0."""
    return values.gather(-1, tokens[..., None].clamp_min(0)).squeeze(-1)


def _named(processor: LogitsProcessor) -> str:
    return getattr(processor, "__name__", type(processor).__name__)


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Tokens [N] drawn from rows [N, V] of probabilities, row i with ``generators[i]``.

    One uniform number for each row, from the generator of the row's sequence: what a sequence draws does not depend on
    the batch around it.
    """
    return inverse_cdf(probabilities, uniforms(generators, probabilities.device))


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [N] at the numbers ``uniform`` [N] in [0, 1) of the cumulative probabilities of rows [N, V], in float64.

    -1 where the probabilities are nan or all 0, so that nothing can be drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    threshold = uniform[:, None] * total
    # The first token whose cumulative mass exceeds the threshold, so a token of probability zero is never drawn.
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    token = token.clamp_max(probabilities.shape[-1] - 1)
    return token.masked_fill_(~(total[:, 0] > 0), -1)


def uniforms(generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Numbers [N] in [0, 1), float64, one from each generator in turn."""
    return to_device(torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]), device)


class UniformStream:
    """The random numbers of one sequence, in [0, 1), float64: looked at before it is known how many are used."""

    def __init__(self, generator: torch.Generator):
        self._generator = generator
        self._ahead = torch.empty(0, dtype=torch.float64)

    def peek(self, count: int) -> Tensor:
        """The next ``count`` numbers [count], which stay the next ones."""
        missing = count - len(self._ahead)
        if missing > 0:
            fresh = torch.rand(missing, generator=self._generator, dtype=torch.float64)
            self._ahead = torch.cat([self._ahead, fresh])
        return self._ahead[:count]

    def advance(self, count: int) -> None:
        """Count the next ``count`` numbers as used."""
        self._ahead = self._ahead[count:]
