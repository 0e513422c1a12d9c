"""The sampling algorithm of Resample-Previous-Tokens for one sequence, as a coroutine around forward passes.

Source: arXiv 2506.06215. It yields a request, for rows to be run or for hidden states to be sent through the head, and
is sent the answer; the decoder collects the requests of a whole batch and answers them together.

The newest tokens are tentative. Their oldest, x_i, is revised once the window x_i .. x_{i+w-1} is drawn, and then
committed. ``hidden`` keeps, by position, the states of the next-token rows of tokens as they stand; a change of x_i
drops all from i on, because they depend on it, and the next forward computes them again.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from decoding.batch import Batch, Sequence
from decoding.forward.rows import RowList
from rpt.config import ResampleConfig
from rpt.previous_rows import AcceptRule, add_previous_rows


@dataclass
class RowsRequest:
    """Run ``rows``; answered by their hidden states [R, D] and the logits [N, V] of the rows ``asked`` for."""

    rows: RowList
    asked: list[int]


@dataclass
class LogitsRequest:
    """Answered by the logits [N, V] of ``hidden`` [N, D]."""

    hidden: Tensor


@dataclass(frozen=True)
class Procedure:
    """What is done to each window; see ResampleDecoder. half_steps: 0 draws tokens and revises none.

    row_before: whether the row before the revised token runs again. config: how the model was trained, None without
    half steps.
    """

    window: int
    half_steps: int
    accept_rule: AcceptRule
    redraws_always: bool
    two_slot: bool
    row_before: bool
    config: ResampleConfig | None


@dataclass
class Resampler:
    """What one sequence knows: committed and tentative tokens, and the states and logits of their next-token rows."""

    batch: Batch
    sequence: Sequence
    procedure: Procedure
    text: list[int] = field(init=False)
    cached: int = field(init=False)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    drawn_at: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, float] = field(default_factory=dict)
    changes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self):
        self.text, self.cached = list(self.sequence.tokens), self.sequence.cached

    @property
    def tentative(self) -> list[int]:
        return self.text[len(self.sequence.tokens) :]

    def copied(self, sequence: Sequence) -> "Resampler":
        """One for ``sequence``, a copy of this one's: it goes on from here, as this one does after it has committed."""
        other = Resampler(self.batch, sequence, self.procedure)
        other.text, other.cached = list(self.text), self.cached
        for name in ("hidden", "logits", "drawn_at", "logprobs", "changes"):
            setattr(other, name, dict(getattr(self, name)))
        return other

    def run(self) -> Generator[RowsRequest | LogitsRequest, Any, None]:
        """Decode the sequence to its end."""
        width = self.procedure.window if self.procedure.half_steps else 1
        while not self.sequence.finished:
            while self._may_grow(width):
                yield from self._draw(len(self.text))
            if len(self.tentative) == width > 1:
                yield from self._revise()
            self._commit_oldest()

    def _may_grow(self, width: int) -> bool:
        ended = bool(self.tentative) and self._is_end(self.text[-1])
        return len(self.tentative) < width and len(self.text) < self.sequence.limit and not ended

    def _is_end(self, token: int) -> bool:
        return token in self.batch.stopping.eos_token_ids

    def _revise(self):
        """The half steps of one window: odd ones resample x_i, even ones draw the tokens after it anew."""
        i, seen = len(self.sequence.tokens), set()
        for half in range(1, self.procedure.half_steps + 1):
            if half % 2:
                old = self.text[i]
                yield from self._resample(i)
                changed = self.text[i] != old
                if self._is_end(self.text[i]):
                    self._cut(i + 1)
                    return
            elif changed or self.procedure.redraws_always:
                for position in range(i + 1, i + self.procedure.window):
                    yield from self._draw(position)
                    if self._is_end(self.text[position]) and position + 1 < len(self.text):
                        self._cut(position + 1)
                        return
            if half % 2 == 0 and not self.batch.pipeline.do_sample:
                state = tuple(self.tentative)
                if state in seen:
                    return
                seen.add(state)

    def _draw(self, position: int):
        """Draw the token at ``position`` from its next-token distribution."""
        raw = yield from self._next_token_logits(position - 1)
        scores = self.batch.pipeline.process(raw.clone(), self._left_of(position))
        token = int(self.batch.pipeline.sample(scores, [self.sequence.generator]))
        self.batch.check_decided(self.sequence, [token])
        self._put(position, token, raw)

    def _resample(self, i: int):
        """Replace x_i by what the accept rule makes of its previous-token logits."""
        procedure, rows, pending = self.procedure, RowList(), range(0)
        assert procedure.config is not None
        if procedure.two_slot:
            pending = self._add_pending(rows)
        previous = add_previous_rows(
            rows, self.text, i, procedure.window, procedure.config, len(self.text), procedure.row_before
        )
        hidden, logits = yield RowsRequest(rows, [previous[-1], *pending[-1:]])
        if pending:
            self._keep(hidden[pending.start : pending.stop])
            self.logits[len(self.text) - 1] = logits[1:]
        raw, old = logits[:1], self.text[i]
        accept = procedure.accept_rule
        generators = [self.sequence.generator]
        token = int(accept(self.batch.pipeline, raw.clone(), [old], self._left_of(i), generators))
        drawn = accept.accept == "gibbs" or token != old
        self.changes[i] += token != old
        self._put(i, token, raw if drawn else None)

    def _next_token_logits(self, position: int):
        """Logits [1, V] of the next-token row of the token at ``position``."""
        if position not in self.hidden:
            rows, first = RowList(), self.cached
            pending = self._add_pending(rows)
            hidden, logits = yield RowsRequest(rows, [pending[position - first]])
            self._keep(hidden)
            self.logits[position] = logits
        if position not in self.logits:
            self.logits[position] = yield LogitsRequest(self.hidden[position][None])
        return self.logits[position]

    def _add_pending(self, rows: RowList) -> range:
        """Add the next-token rows of the tokens that are not in the cache."""
        return rows.add_causal(self.text[self.cached :], self.cached)

    def _keep(self, hidden: Tensor) -> None:
        """States [R, D] of the rows behind the cache: their keys and values are now in it."""
        self.logits.clear()  # logits are large; they are computed again from the states where they are asked for again
        oldest = len(self.sequence.tokens) - 1
        for position, state in enumerate(hidden, self.cached):
            if position >= oldest:
                self.hidden[position] = state
        self.cached = len(self.text)

    def _put(self, position: int, token: int, raw: Tensor | None) -> None:
        """Set the token at ``position``; ``raw`` are the logits it was drawn from, None if it was kept without a draw."""
        if position == len(self.text):
            self.text.append(token)
            self.changes[position] = 0
            self.drawn_at[position] = self.sequence.forwards
        elif self.text[position] != token:
            self.text[position] = token
            self.drawn_at[position] = self.sequence.forwards
            self._forget(position)
        if raw is not None and self.batch.wants_logprobs:
            self.logprobs[position] = raw[0].log_softmax(-1)[token].item()

    def _cut(self, position: int) -> None:
        del self.text[position:]
        self._forget(position)

    def _forget(self, position: int) -> None:
        """Drop what was computed from the token at ``position``."""
        self.cached = min(self.cached, position)
        for known in (self.hidden, self.logits):
            for later in [p for p in known if p >= position]:
                del known[later]

    def _commit_oldest(self) -> None:
        i = len(self.sequence.tokens)
        logprob = [self.logprobs.pop(i)] if self.batch.wants_logprobs else None
        self.batch.commit(self.sequence, [self.text[i]], [self.drawn_at.pop(i)], logprob, [self.changes.pop(i)])
        self.hidden.pop(i - 1, None)
        self.logits.pop(i - 1, None)

    def _left_of(self, position: int):
        sequence = self.sequence
        return lambda row: sequence.left_of(self.text[len(sequence.tokens) : position])
