"""From logits to laws and tokens: transformers' logits processors, and draws that do not depend on the batch.

Shapes: N rows, V vocabulary. All decisions are made in float32, draws in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as processors

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
# Row -> (index of its sequence in the user's batch, the token ids to its left, padding included).
Context = Callable[[int], tuple[int, list[int]]]


@dataclass(frozen=True)
class TokenLaw:
    """The law from which tokens are chosen: processors, the mask token ruled out, greedy or sampled.

    ``forbidden`` is the mask token's id: it is never emitted, whatever its logit. ``batch_size`` is that of the user's
    batch, finished sequences included.
    """

    processors: LogitsProcessorList
    do_sample: bool
    forbidden: int | None = None
    batch_size: int = 1

    def __post_init__(self):
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
                    f"{decoder_name} cannot honour {type(processor).__name__} inside a block, where the tokens to the left "
                    f"may be undecided; SelfSpeculativeDecoder and NextTokenDecoder can"
                )

    def scores(self, logits: Tensor, context: Context | None = None) -> Tensor:
        """Processed logits [N, V]. ``context(i)`` gives the sequence of row i and the token ids to its left.

        Without ``context`` only the processors that need none are applied. ``logits`` may be overwritten.
        """
        if self.forbidden is not None:
            logits[:, self.forbidden] = -torch.inf
        for processor in self.processors:
            if isinstance(processor, CONTEXT_FREE):
                logits = processor(None, logits)
            elif context is not None:
                logits = torch.cat(
                    [self._one_row(processor, logits[i : i + 1], *context(i)) for i in range(len(logits))]
                )
        return logits

    def at_temperature(self, temperature: float) -> "TokenLaw":
        """The law as if ``generate`` had been asked for ``temperature``; all other processors as they are."""
        is_temperature = [isinstance(p, processors.TemperatureLogitsWarper) for p in self.processors]
        others = [p for p, drop in zip(self.processors, is_temperature, strict=True) if not drop]
        first = is_temperature.index(True) if True in is_temperature else len(others)
        own = processors.TemperatureLogitsWarper(float(temperature))
        return replace(self, processors=type(self.processors)([*others[:first], own, *others[first:]]))

    def _one_row(self, processor: LogitsProcessor, logits: Tensor, index: int, left: list[int]) -> Tensor:
        # Some processors hold values for each place of the batch they were made for, so the row is shown in its place
        # of a batch of that size.
        ids = torch.tensor([left], device=logits.device).expand(self.batch_size, -1)
        return processor(ids, logits.expand(self.batch_size, -1))[index : index + 1]

    def choose(self, scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Tokens [N]: the likeliest, or drawn with row i's generator."""
        if not self.do_sample:
            return scores.argmax(-1)
        return draw(scores.softmax(-1), generators)


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Tokens [N] drawn from rows [N, V] of probabilities, row i with ``generators[i]``.

    One uniform number for each row, from the generator of the row's sequence: what a sequence draws does not depend on
    the batch around it.
    """
    return inverse_cdf(probabilities, uniforms(generators, probabilities.device))


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [N] at the numbers ``uniform`` [N] in [0, 1) of the cumulative probabilities of rows [N, V], in float64."""
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    # The first token whose cumulative mass exceeds the threshold, so a token of probability zero is never drawn.
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token.clamp_max(probabilities.shape[-1] - 1)


def uniforms(generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Numbers [N] in [0, 1), float64, one from each generator in turn."""
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(device)


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
