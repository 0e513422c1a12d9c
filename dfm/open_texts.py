"""The texts that are being denoised in a run of the engine, and the groups in which they take their sampler's steps.

Sequences end blocks at different times and leave the batch; a sampler's step is one coroutine over a state [B, L]. So
texts are grouped anew between steps: those that stand at the start of one take it together, whatever their times.
Every sequence draws from its own generator, and no position looks at another sequence, so a text is what it would be
alone. Shapes: B texts of a group, L tokens of each.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoding.batch import Sequence
from decoding.forward.noise_level import noise_levels, transition_levels
from decoding.forward.transfer import to_device
from dfm.draws import Draws
from dfm.flow_run import FlowRun, make_draws
from dfm.sampling.state import FlowState, Query, Sampler, Step

ROWS_AT_ONCE = 1024  # tokens of a group, whose distributions over the vocabulary are held at the same time


@dataclass
class OpenText:
    """A block, or all that follows the prompt, of one sequence; its first token is token ``start`` of the sequence.

    group, row: where its state is. index, rows, causal: the place of its sequence in the running forward, and the handles
    of the text's rows and of those of the committed text right before them. last_row: hidden state [1, D] of the row
    before a block, where that row predicts the block's first token.
    """

    start: int
    group: "Group"
    row: int
    index: int = 0
    rows: range = range(0)
    causal: range = range(0)
    last_row: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """Its ids [L] as they are now, the source's noise where nothing is decided."""
        return self.group.state.x[self.row]


@dataclass(eq=False)
class Group:
    """Texts that take their steps together: row i of everything belongs to ``sequences[i]``, None if its text is done.

    decided_at: [B, L], the forward that last changed each token. step: the running step, None between steps; query: what
    it waits for.
    """

    sequences: list[Sequence | None]
    sampler: Sampler
    state: FlowState
    draws: Draws
    decided_at: Tensor
    step: Step | None = None
    query: Query = field(init=False)

    def begin_step(self) -> None:
        self.step = self.sampler.step(self.state, self.draws)
        self.query = next(self.step)

    def answer(self, p1: Tensor) -> None:
        """Give the running step the distribution that it asked for; afterwards it asks again or is over."""
        state = self.state
        assert self.step is not None
        x, masked = state.x, state.masked
        state.evaluations = state.evaluations + ~state.done
        try:
            self.query = self.step.send(p1)
        except StopIteration:
            self.step = None
        forwards = [0 if sequence is None else sequence.forwards for sequence in self.sequences]
        changed = (state.x != x) | (state.masked != masked)
        now = to_device(forwards, changed.device)[:, None]
        self.decided_at = torch.where(changed, now, self.decided_at)

    def among_present(self, where: Tensor) -> Tensor:
        """The positions ``where`` [B, L] bool of texts that have not left."""
        if None not in self.sequences:
            return where
        here = [sequence is not None for sequence in self.sequences]
        return where & torch.tensor(here, device=where.device)[:, None]

    def rows_of(self, sequences: SequenceOf[Sequence]) -> tuple[FlowState, Tensor]:
        """State and ``decided_at`` of those texts."""
        rows = [sequence.state.row for sequence in sequences]
        return self.state.at(rows), self.decided_at[rows]


@dataclass
class OpenTexts:
    """All texts of a run. block_size: None where a text is all that follows its prompt. greedy: take likeliest tokens."""

    run: FlowRun
    block_size: int | None
    greedy: bool
    device: torch.device
    groups: list[Group] = field(default_factory=list)

    def begin_steps(self, sequences: SequenceOf[Sequence]) -> None:
        """Open a text for each sequence that has none; group those between steps, and begin their next one."""
        waiting: dict[int, list[Sequence]] = {}
        for sequence in sequences:
            text: OpenText | None = sequence.state
            if text is None or text.group.step is None:
                waiting.setdefault(self._length(sequence), []).append(sequence)
        self.groups = [group for group in self.groups if group.step is not None]
        for length, members in waiting.items():
            size = max(1, ROWS_AT_ONCE // length)
            for first in range(0, len(members), size):
                group = self._group(members[first : first + size], length)
                group.begin_step()
                self.groups.append(group)

    def levels(self, group: Group) -> list[list[int]] | None:
        """How noisy the tokens of its query are, for models that are told (:mod:`decoding.forward.noise_level`)."""
        if not self.run.takes_levels:
            return None
        kappa, query = self.run.path.scheduler.kappa, group.query
        levels = noise_levels(kappa(query.t), group.state.frozen)
        if query.until is not None and query.noise is not None:
            levels = transition_levels(levels, kappa(query.until)[:, None], query.noise)
        return levels.tolist()

    def _length(self, sequence: Sequence) -> int:
        if self.block_size is not None:
            return self.block_size
        return sequence.room if sequence.state is None else len(sequence.state.tokens)

    def _group(self, sequences: list[Sequence], length: int) -> Group:
        """A group between two steps; the one that they are in, if they have it to themselves."""
        fresh = [sequence for sequence in sequences if sequence.state is None]
        members: dict[Group, list[Sequence]] = {}
        for sequence in sequences:
            if sequence.state is not None:
                members.setdefault(sequence.state.group, []).append(sequence)
        if not fresh and len(members) == 1:
            (group,) = members
            if len(group.sequences) == len(sequences):
                return group
        sampler = self.run.make_sampler(length)
        parts = [group.rows_of(kept) for group, kept in members.items()]
        if fresh:
            parts.append(self._noise(sampler, fresh, length))
        ordered = [*sum(members.values(), []), *fresh]
        states, decided_at = zip(*parts, strict=True)
        draws = make_draws(sampler, [sequence.generator for sequence in ordered], self.greedy)
        group = Group(list(ordered), sampler, FlowState.concatenate(states), draws, torch.cat(decided_at))
        for row, sequence in enumerate(ordered):
            if sequence.state is None:
                sequence.state = OpenText(len(sequence.tokens), group, row)
            sequence.state.group, sequence.state.row = group, row
        return group

    def _noise(self, sampler: Sampler, sequences: list[Sequence], length: int) -> tuple[FlowState, Tensor]:
        """State and ``decided_at`` of new texts: the source."""
        nothing = torch.zeros(len(sequences), length, dtype=torch.long, device=self.device)
        draws = make_draws(sampler, [sequence.generator for sequence in sequences], self.greedy)
        return FlowState.start(nothing, nothing.bool(), self.run.path.source, draws), nothing
