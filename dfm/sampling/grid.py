"""Grids of times, and the samplers that walk along one."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.inputs.checks import check_count, check_range
from dfm.draws import Draws
from dfm.paths.path import Path, delta
from dfm.paths.schedulers import Scheduler
from dfm.sampling.state import FlowState, Query, Sampler, Step


def time_grid(steps: int, end: float = 1.0, even_in: Scheduler | None = None) -> tuple[float, ...]:
    """``steps`` + 1 times from 0 to ``end``, evenly spaced in t, or in kappa of the scheduler ``even_in``.

    >>> time_grid(4)
    (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    check_count("steps", steps)
    check_range("end", end, 0, 1, include_low=False)
    last = torch.tensor(end, dtype=torch.float64)
    if even_in is None:
        return tuple((torch.arange(steps + 1, dtype=torch.float64) / steps * last).tolist())
    kappa = torch.arange(steps + 1, dtype=torch.float64) / steps * even_in.kappa(last)
    inner = even_in.inverse(kappa)[1:-1]
    return (0.0, *inner.tolist(), end)


@dataclass(frozen=True)
class GridSampler(Sampler):
    """A sampler that steps through ``grid``, rising times from 0 to 1.

    It may end before 1. It may start after 0, for rates that are infinite there: the source is then taken for a text at
    the first time, which is wrong by kappa of that time.
    """

    path: Path
    grid: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        rises = all(low < high for low, high in zip(self.grid, self.grid[1:], strict=False))
        if len(self.grid) < 2 or not rises or self.grid[0] < 0 or self.grid[-1] > 1:
            raise ValueError(f"grid must be two or more rising times in [0, 1], got {self.grid}")

    def next_time(self, state: FlowState) -> Tensor:
        """The first time of the grid after state.t [B], which is moved to the grid's start; its end for those there."""
        state.t = state.t.clamp_min(self.grid[0])
        grid = torch.tensor(self.grid, dtype=state.t.dtype, device=state.t.device)
        return grid[torch.searchsorted(grid, state.t, right=True).clamp_max(len(grid) - 1)]


@dataclass(frozen=True)
class DistributionSampler(GridSampler):
    """A step is one draw from ``distribution``, the distribution of the next token of each position given the whole
    current text.

    Positions are drawn independently, so the transition of a text is the product over its positions. At time 1 every
    token is drawn from p_1t, whatever the discretisation of time has left undone.
    """

    @abstractmethod
    def distribution(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        """[B, L, V]: from state.x at state.t to the times s [B], given the posterior p1 [B, L, V]."""

    def jump_probability(self, state: FlowState, s: Tensor) -> Tensor | None:
        """[B], if ``distribution`` is that of drawing x1 ~ p_1t with this probability and staying otherwise; else None."""
        return None

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        probability = self.jump_probability(state, s)
        if probability is not None:
            # Whether a position jumps is independent of where to, so p_1t is asked for at those that jump alone.
            probability = torch.where(s >= 1, 1, probability)
            undecided = state.free if self.path.source.mask_id is None else state.free & state.masked
            jumps = draws.happens(probability, undecided)
            p1 = yield Query(state.x, state.t, state.masked, only=jumps)
            state.write(draws.rows(p1, jumps), jumps)
            state.advance(s, self.grid[-1])
            return
        p1 = yield Query(state.x, state.t, state.masked)
        state.draw(finish(self.distribution(state, p1, s), p1, s), draws, self.path.source.mask_id)
        state.advance(s, self.grid[-1])


@dataclass(frozen=True)
class GivenDataSampler(DistributionSampler):
    """x1 ~ p_1t at every position, then X' ~ distribution_given(x1): for rates given x1, which exist for every path, also where
    their posterior mean has no closed form."""

    @abstractmethod
    def distribution_given(self, state: FlowState, x1: Tensor, s: Tensor) -> Tensor:
        """[B, L, V] in the dtype of state.t, for the data tokens x1 [B, L]."""

    def distribution(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        """The two draws of a step as one distribution: sums over x1, so for small vocabularies only."""
        total = torch.zeros_like(p1)
        for token in range(p1.shape[-1]):
            total += p1[..., token, None] * self.distribution_given(state, torch.full_like(state.x, token), s).to(p1)
        return total

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        if self.jump_probability(state, s) is not None:
            yield from super().step(state, draws)
            return
        p1 = yield Query(state.x, state.t, state.masked)
        x1 = draws.categorical(p1, state.free)
        distribution = self.distribution_given(state, x1, s)
        distribution = finish(distribution, delta(x1, distribution.shape[-1], distribution), s)
        state.draw(distribution, draws, self.path.source.mask_id)
        state.advance(s, self.grid[-1])


def finish(distribution: Tensor, p1: Tensor, s: Tensor) -> Tensor:
    """The distribution of a step [B, L, V], replaced by p_1t in sequences that step to time 1."""
    last = s >= 1
    return torch.where(last[:, None, None], p1, distribution) if last.any() else distribution


def kappas(scheduler: Scheduler, t: Tensor, s: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """kappa at the times t and s [B], as [B, 1, 1], or [B, 1, V] if it differs by data token, in the dtype of like."""
    return scheduler.kappa(t[:, None, None]).to(like), scheduler.kappa(s[:, None, None]).to(like)
