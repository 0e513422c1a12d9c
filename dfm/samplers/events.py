"""Samplers that go from event to event instead of along a grid: no error of time."""

from dataclasses import dataclass

import torch

from decoding.inputs.checks import check_range
from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.sources import check_mask
from dfm.sampling.state import FlowState, Query, Sampler, Step


@dataclass(frozen=True)
class FirstHitting(Sampler):
    """With n masks left the next is revealed at 1 - k' = (1 - k) U^(1/n), U ~ U(0, 1), at a position chosen uniformly
    (arXiv 2409.02908).

    The tokens depend on the order, not on the times, if the network ignores time: random-order ancestral sampling.
    ValueError for a source without mask token.
    """

    name = "first_hitting"
    sources = ("mask",)
    on_grid = False
    keeps = True

    path: MixturePath

    def __post_init__(self):
        check_mask(self.path.source, wanted=True)

    def step(self, state: FlowState, draws: Draws) -> Step:
        left = state.masked & state.free
        revealed = draws.pick(left)
        survival = draws.uniform(revealed).sum(-1) ** (1 / left.sum(-1).clamp_min(1))
        scheduler = self.path.scheduler.shared()
        k = scheduler.kappa(state.t)
        t = torch.where(state.done, state.t, scheduler.inverse(1 - (1 - k) * survival))
        p1 = yield Query(state.x, t, state.masked, only=revealed)
        state.write(draws.rows(p1, revealed), revealed)
        state.t = t
        state.done = state.done | ~(state.masked & state.free).any(-1)


@dataclass(frozen=True)
class Uniformisation(Sampler):
    """In the clock -ln(1 - kappa) events come at rate L, the number of free positions (Gillespie).

    At an event one position, chosen uniformly, is set to x1 ~ p_1t at the event's time. At 1 - kappa = rest every
    position is drawn from p_1t, so the error is that of rest. About L ln(1/rest) evaluations: a reference for
    tests, too slow for long texts.
    """

    name = "uniformisation"
    sources = ("uniform",)
    on_grid = False

    path: MixturePath
    rest: float = 1e-3

    def __post_init__(self):
        check_range("rest", self.rest, 0, 1, include_low=False, include_high=False)

    def step(self, state: FlowState, draws: Draws) -> Step:
        free, scheduler = state.free, self.path.scheduler.shared()
        chosen = draws.pick(free)
        waiting = -torch.log1p(-draws.uniform(chosen).sum(-1)) / free.sum(-1).clamp_min(1)
        log_survival = scheduler.log_survival(state.t) - waiting
        ends = log_survival.exp() <= self.rest
        t = scheduler.inverse(1 - log_survival.exp().clamp_min(self.rest))
        t = torch.where(state.done, state.t, t)
        drawn = torch.where(ends[:, None], free, chosen)
        p1 = yield Query(state.x, t, state.masked, only=drawn)
        state.write(draws.rows(p1, drawn), drawn)
        state.t = t
        state.done = state.done | ends
