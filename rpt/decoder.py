"""Resample-Previous-Tokens: draw tokens one by one, and revise each once the tokens after it are known.

Source: arXiv 2506.06215. Buys quality rather than speed: a token that its successors make unlikely can still be replaced.
Lossy by intent: the text is not that of plain next-token decoding unless iterations is 0.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from decoding.batch import Batch, Sequence
from decoding.decoder import Decoder
from decoding.engine import Engine, Step
from decoding.forward.rows import RowList
from decoding.inputs.checks import check_choice, check_count
from decoding.sampling import LogitsPipeline
from rpt.config import ResampleConfig, check_resampling
from rpt.previous_rows import AcceptRule
from rpt.resampler import LogitsRequest, Procedure, Resampler, RowsRequest


@dataclass(frozen=True)
class ResampleDecoder(Decoder):
    """Revise each token ``iterations`` times once the ``window`` - 1 tokens after it are drawn, then commit it.

    iterations: k, a multiple of 0.5. Odd half steps resample the oldest token of the window from its previous-token
        distribution, even ones draw the others anew. 0 is next-token decoding; 0.5 is the best value for its price.
    accept, threshold, temperature_ptp: see :class:`rpt.previous_rows.AcceptRule`.
    redraw: draw the later tokens anew "always" (keeps the joint distribution, if the distributions are exact) or
        only "if_changed".
    schedule: "two_slot" runs the newest token's next-token row and the previous-token rows in one
        forward, so a token costs 1 + P(change) forwards at iterations 0.5; "plain" runs them apart, 2 forwards. The
        tokens are the same.
    refresh_prev: compute the row before the revised token anew, with the offset it had in training; by default as the
        model was trained (prev_target "follow").

    A token that would stand behind an EOS or beyond the limit is not drawn, so the last tokens are committed as they are.
    Streams committed tokens only, window - 1 tokens late.
    """

    window: int = 2
    iterations: float = 0.5
    accept: Literal["gibbs", "argmax_threshold"] = "gibbs"
    threshold: float = 0.9
    temperature_ptp: float | None = None
    redraw: Literal["always", "if_changed"] = "always"
    schedule: Literal["two_slot", "plain"] = "two_slot"
    refresh_prev: bool | None = None

    def __post_init__(self) -> None:
        check_count("window", self.window, 2)
        is_number = isinstance(self.iterations, (int, float)) and not isinstance(self.iterations, bool)
        if not is_number or not 0 <= self.iterations <= 64 or (2 * self.iterations) % 1:
            raise ValueError(f"iterations must be a multiple of 0.5 from 0 to 64, got {self.iterations!r}")
        _ = self.accept_rule  # checks its fields
        check_choice("redraw", self.redraw, ("always", "if_changed"))
        check_choice("schedule", self.schedule, ("two_slot", "plain"))
        check_choice("refresh_prev", self.refresh_prev, (None, True, False))

    @property
    def gives_logprobs(self) -> bool:
        return True

    @property
    def accept_rule(self) -> AcceptRule:
        return AcceptRule(self.accept, self.threshold, self.temperature_ptp)

    def check(self, model, pipeline: LogitsPipeline) -> None:
        pipeline.check_stateless(type(self).__name__, model.config.get_text_config().vocab_size)
        if self.iterations:
            check_resampling(model, self.window)
            config = ResampleConfig.from_config(model.config)
            if self.refresh_prev and config.prev_target == "ntp":
                raise ValueError(
                    "refresh_prev must be None or False for a model trained with prev_target 'ntp', got True"
                )

    def begin(self, batch: Batch, engine: Engine) -> None:
        config = ResampleConfig.from_config(engine.model.config) if self.iterations else None
        procedure = Procedure(
            window=self.window,
            half_steps=round(2 * self.iterations),
            accept_rule=self.accept_rule,
            redraws_always=self.redraw == "always",
            two_slot=self.schedule == "two_slot",
            row_before=config is not None and self._runs_row_before(config),
            config=config,
        )
        for sequence in batch.sequences:
            sequence.state = Coroutine(Resampler(batch, sequence, procedure))

    def fork(self, batch: Batch, sequence: Sequence, source: Sequence, engine: Engine) -> None:
        sequence.state = Coroutine(source.state.resampler.copied(sequence))

    def plan(self, batch: Batch) -> list[RowList]:
        return [sequence.state.request.rows for sequence in batch.unfinished]

    def absorb(self, batch: Batch, step: Step) -> None:
        states: list[Coroutine] = [sequence.state for sequence in step.sequences]
        requests = [state.request for state in states if isinstance(state.request, RowsRequest)]  # all of them
        # One call of the head for all sequences.
        raw = step.logits((i, request.asked) for i, request in enumerate(requests))
        logits = raw.split([len(request.asked) for request in requests])
        for i, (state, request) in enumerate(zip(states, requests, strict=True)):
            state.send((step.hidden([(i, range(len(request.rows)))]), logits[i]))
        while asking := [(state, r.hidden) for state in states if isinstance(r := state.request, LogitsRequest)]:
            raw = step.head(torch.cat([hidden for _, hidden in asking]))
            for (state, _), row in zip(asking, raw.split(1), strict=True):
                state.send(row)
        for sequence in step.sequences:
            sequence.cached = min(sequence.state.resampler.cached, len(sequence.tokens))

    def preview(self, batch: Batch) -> list[int] | None:
        return batch.sequences[0].state.resampler.tentative

    def _runs_row_before(self, config: ResampleConfig) -> bool:
        return config.prev_target == "follow" if self.refresh_prev is None else self.refresh_prev


class Coroutine:
    """A resampler that has been started, and what it asks for; None at its end."""

    def __init__(self, resampler: Resampler):
        self.resampler = resampler
        self._steps = resampler.run()
        self.request = next(self._steps, None)

    def send(self, answer: Any) -> None:
        try:
            self.request = self._steps.send(answer)
        except StopIteration:
            self.request = None
