"""The sampling algorithm of Resample-Previous-Tokens for one sequence, as a coroutine around forward passes.

Source: arXiv 2506.06215. It yields what it needs to know, a Forward (rows to run) or Laws (hidden states to send through
the head), and is sent the answer; the decoder collects the wishes of a whole batch and fulfils them together.

The newest tokens are tentative. Their oldest, x_i, is revised once the window x_i .. x_{i+w-1} is drawn, and then
committed. ``hidden`` keeps, by place, the states of the next-token rows of tokens as they stand; a change of x_i drops
all from i on, because they depend on it, and the next forward computes them again.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from decoding.batch import Batch, Sequence
from decoding.forward.rows import RowList
from rpt.config import ResampleConfig
from rpt.previous_rows import add_previous_rows


@dataclass
class Forward:
    """Run ``rows``; answered by their hidden states [R, D] and the logits [len(wanted), V] of the rows in ``wanted``."""

    rows: RowList
    wanted: list[int]


@dataclass
class Laws:
    """Answered by the logits [N, V] of ``hidden`` [N, D]."""

    hidden: Tensor


@dataclass
class Resampler:
    """What one sequence knows: committed and tentative tokens, and the states and laws of their rows."""

    batch: Batch
    sequence: Sequence
    settings: Any  # the ResampleDecoder
    config: ResampleConfig | None
    text: list[int] = field(init=False)
    cached: int = field(init=False)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    laws: dict[int, Tensor] = field(default_factory=dict)
    drawn_at: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, float] = field(default_factory=dict)
    changes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self):
        self.text, self.cached = list(self.sequence.tokens), self.sequence.cached

    @property
    def tentative(self) -> list[int]:
        return self.text[len(self.sequence.tokens) :]

    def run(self) -> Generator[Forward | Laws, Any, None]:
        """Decode the sequence to its end."""
        width = self.settings.window if self.settings.iterations else 1
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
        for half in range(1, round(2 * self.settings.iterations) + 1):
            if half % 2:
                old = self.text[i]
                yield from self._resample(i)
                changed = self.text[i] != old
                if self._is_end(self.text[i]):
                    self._cut(i + 1)
                    return
            elif changed or self.settings.redraw == "always":
                for place in range(i + 1, i + self.settings.window):
                    yield from self._draw(place)
                    if self._is_end(self.text[place]) and place + 1 < len(self.text):
                        self._cut(place + 1)
                        return
            if half % 2 == 0 and not self.batch.pipeline.do_sample:
                state = tuple(self.tentative)
                if state in seen:
                    return
                seen.add(state)

    def _draw(self, place: int):
        """Draw the token at ``place`` from its next-token law."""
        raw = yield from self._next_token_law(place - 1)
        scores = self.batch.pipeline.process(raw.clone(), self._left_of(place))
        token = int(self.batch.pipeline.sample(scores, [self.sequence.generator]))
        self.batch.check_decided(self.sequence, [token])
        self._put(place, token, raw)

    def _resample(self, i: int):
        """Replace x_i by what the accept rule makes of its previous-token law."""
        rows, pending = RowList(), range(0)
        if self.settings.schedule == "two_slot":
            pending = self._add_pending(rows)
        previous = add_previous_rows(
            rows,
            self.text,
            i,
            self.settings.window,
            self.config,
            len(self.text),
            self.settings.runs_row_before(self.config),
        )
        hidden, logits = yield Forward(rows, [previous[-1], *pending[-1:]])
        if pending:
            self._keep(hidden[pending.start : pending.stop])
            self.laws[len(self.text) - 1] = logits[1:]
        raw, old = logits[:1], self.text[i]
        accept = self.settings.accept_rule
        generators = [self.sequence.generator]
        token = int(accept(self.batch.pipeline, raw.clone(), [old], self._left_of(i), generators))
        drawn = accept.accept == "gibbs" or token != old
        self.changes[i] += token != old
        self._put(i, token, raw if drawn else None)

    def _next_token_law(self, place: int):
        """Logits [1, V] of the next-token row of the token at ``place``."""
        if place not in self.hidden:
            rows, first = RowList(), self.cached
            pending = self._add_pending(rows)
            hidden, logits = yield Forward(rows, [pending[place - first]])
            self._keep(hidden)
            self.laws[place] = logits
        if place not in self.laws:
            self.laws[place] = yield Laws(self.hidden[place][None])
        return self.laws[place]

    def _add_pending(self, rows: RowList) -> range:
        """Add the next-token rows of the tokens that are not in the cache."""
        return rows.add_causal(self.text[self.cached :], self.cached)

    def _keep(self, hidden: Tensor) -> None:
        """States [R, D] of the rows behind the cache: their keys and values are now in it."""
        self.laws.clear()  # logits are large; they are computed again from the states where they are asked for again
        oldest = len(self.sequence.tokens) - 1
        for place, state in enumerate(hidden, self.cached):
            if place >= oldest:
                self.hidden[place] = state
        self.cached = len(self.text)

    def _put(self, place: int, token: int, raw: Tensor | None) -> None:
        """Set the token at ``place``; ``raw`` are the logits it was drawn from, None if it was kept without a draw."""
        if place == len(self.text):
            self.text.append(token)
            self.changes[place] = 0
            self.drawn_at[place] = self.sequence.forwards
        elif self.text[place] != token:
            self.text[place] = token
            self.drawn_at[place] = self.sequence.forwards
            self._forget(place)
        if raw is not None and self.batch.wants_logprobs:
            self.logprobs[place] = raw[0].log_softmax(-1)[token].item()

    def _cut(self, place: int) -> None:
        del self.text[place:]
        self._forget(place)

    def _forget(self, place: int) -> None:
        """Drop what was computed from the token at ``place``."""
        self.cached = min(self.cached, place)
        for known in (self.hidden, self.laws):
            for later in [p for p in known if p >= place]:
                del known[later]

    def _commit_oldest(self) -> None:
        i = len(self.sequence.tokens)
        logprob = [self.logprobs.pop(i)] if self.batch.wants_logprobs else None
        self.batch.commit(self.sequence, [self.text[i]], [self.drawn_at.pop(i)], logprob, [self.changes.pop(i)])
        self.hidden.pop(i - 1, None)
        self.laws.pop(i - 1, None)

    def _left_of(self, place: int):
        sequence = self.sequence
        return lambda row: sequence.left_of(self.text[len(sequence.tokens) : place])
