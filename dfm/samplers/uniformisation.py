"""Uniformisation of a mixture: exact in time up to its end, one event an evaluation.

A reference for tests, too slow for long texts.
"""

from dataclasses import dataclass

import torch

from decoding.checks import check_range
from dfm.draws import Draws
from dfm.paths import MixturePath
from dfm.samplers.state import FlowState, Query, Step


@dataclass(frozen=True)
class Uniformisation:
    """In the clock -ln(1 - kappa) events come at rate L, the number of free positions (Gillespie).

    At an event one position, chosen uniformly, is set to x1 ~ p_1t at the event's time. At 1 - kappa = rest every
    position is drawn from p_1t, so the error is that of rest. About L ln(1/rest) evaluations.
    """

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
        p1 = yield Query(state.x, t, state.masked)
        drawn = torch.where(ends[:, None], free, chosen)
        state.write(draws.categorical(p1, drawn), drawn)
        state.t = t
        state.done = state.done | ends
