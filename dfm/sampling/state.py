"""What a sampler is: what it works on, what it asks of the network, and what a decoder must know of it."""

from abc import ABC, abstractmethod
from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from decoding.forward.transfer import to_device
from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.sources import Source


@dataclass
class FlowState:
    """A batch of texts in the making; sequences need not be at the same time. Changes replace its tensors, never write
    into them, so that who holds one from before a step can tell what the step has changed.

    x: [B, L] ids.
    masked: [B, L] bool, undecided positions of a mask source. Masks are known by it, never by their id, so a prompt
        that holds the mask token as text is harmless.
    frozen: [B, L] bool, never changed and never counted: prompt, given tokens, padding.
    t: [B] float64. done: [B] bool.
    evaluations: [B], network evaluations until done, counted by who answers the queries.
    confidence: [B, L] float64, the probability that a token had when it was revealed.
    """

    x: Tensor
    masked: Tensor
    frozen: Tensor
    t: Tensor
    done: Tensor
    evaluations: Tensor
    confidence: Tensor

    @classmethod
    def start(cls, x: Tensor, frozen: Tensor, source: Source, draws: Draws) -> "FlowState":
        """Time 0: the positions of ``x`` [B, L] that are not ``frozen`` [B, L] bool hold the source."""
        assert frozen.dtype == torch.bool and frozen.shape == x.shape
        x = source.fill(x, ~frozen, draws)
        masked = ~frozen if source.mask_id is not None else torch.zeros_like(frozen)
        time = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        done = frozen.all(-1)
        return cls(x, masked, frozen, time, done, torch.zeros_like(done, dtype=torch.long), torch.ones_like(x).double())

    @classmethod
    def concatenate(cls, states: SequenceOf["FlowState"]) -> "FlowState":
        """One batch of the texts of several, all of one length."""
        return cls(*(torch.cat(parts) for parts in zip(*(vars(state).values() for state in states), strict=True)))

    def at(self, rows: SequenceOf[int]) -> "FlowState":
        """The texts ``rows`` of the batch."""
        index = to_device(rows, self.x.device)
        return FlowState(*(value.index_select(0, index) for value in vars(self).values()))

    @property
    def free(self) -> Tensor:
        """[B, L] bool: positions that may still change."""
        return ~self.frozen & ~self.done[:, None]

    def write(self, tokens: Tensor, where: Tensor) -> None:
        """Decide ``tokens`` [B, L] at the free positions among ``where`` [B, L] bool."""
        where = where & self.free
        self.x = torch.where(where, tokens, self.x)
        self.masked = self.masked & ~where

    def remask(self, where: Tensor, mask_id: int) -> None:
        """Undo the decision at the free positions among ``where`` [B, L] bool."""
        where = where & self.free
        self.x = torch.where(where, mask_id, self.x)
        self.masked = self.masked | where

    def draw(self, distribution: Tensor, draws: Draws, mask_id: int | None) -> None:
        """Draw all free positions from ``distribution`` [B, L, V].

        No posterior gives the mask token a probability, so what is drawn in its column is the source's noise.
        """
        tokens = draws.categorical(distribution, self.free)
        noise = torch.zeros_like(self.masked) if mask_id is None else tokens == mask_id
        self.write(tokens, ~noise)
        if mask_id is not None:
            self.remask(noise, mask_id)

    def advance(self, s: Tensor, end: float) -> None:
        """Move the time of unfinished sequences to ``s`` [B]; those at ``end`` are done."""
        self.t = torch.where(self.done, self.t, s)
        self.done = self.done | (self.t >= end)


@dataclass(frozen=True)
class Query:
    """One evaluation: the answer is p_1t [B, L, V] for the texts x [B, L] at times t [B].

    masked: [B, L] bool as in FlowState. conditional: False asks the unconditional model of classifier-free guidance.
    carry_over: False leaves the network's own distribution at revealed positions of a mask source.
    only: [B, L] bool, the positions whose distribution is wanted, if not of all: the answer is then [N, V], in order
        of position.
    until, noise: the time [B] that the step leads to and numbers [B, L] in [0, 1), for models of transitions.
    """

    x: Tensor
    t: Tensor
    masked: Tensor
    conditional: bool = True
    carry_over: bool = True
    only: Tensor | None = None
    until: Tensor | None = None
    noise: Tensor | None = None


# Yields queries, is sent p_1t [B, L, V] for each, and has changed the state when it returns.
Step = Generator[Query, Tensor, None]


class Sampler(ABC):
    """One step of a sampler, of all texts of the state, each by itself: they may be at different times, and a text is what
    it would be alone. Between steps everything is in the state, so its rows may be exchanged there.

    name: what FlowDecoder and command lines call it, if it is listed in :data:`dfm.samplers.SAMPLERS`; one that is not is
        named ``module:Class``.
    sources: kinds of source it works for. on_grid: it walks along a grid of times, one or more evaluations a step; others
        choose their own number. keeps: with a mask source, what it has revealed stays. ranks_positions: it ranks them by
        their distributions, so that distributions sharpened to one token would leave it nothing to rank by.
        tells_target: it needs a model of transitions.
    """

    name: ClassVar[str] = ""
    sources: ClassVar[tuple[str, ...]] = ("mask", "uniform")
    on_grid: ClassVar[bool] = True
    keeps: ClassVar[bool] = False
    ranks_positions: ClassVar[bool] = False
    tells_target: ClassVar[bool] = False

    @abstractmethod
    def step(self, state: FlowState, draws: Draws) -> Step:
        """A generator: ``p1 = yield Query(...)`` asks for an evaluation, wherever that is made."""

    @classmethod
    def default(cls, path: MixturePath, grid: tuple[float, ...]) -> "Sampler":
        """The sampler that its class or name alone stands for, on ``path`` and, if on a grid, along the times ``grid``."""
        # Subclasses are dataclasses with fields of their own, and those without defaults need a method of their own.
        make: Any = cls
        return make(path, grid) if cls.on_grid else make(path)
