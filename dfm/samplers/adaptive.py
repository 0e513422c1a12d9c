"""Steps no longer than the rates allow."""

from dataclasses import dataclass

import torch

from dfm.draws import Draws
from dfm.samplers.corrector import Corrector
from dfm.samplers.euler import Euler
from dfm.samplers.grid import finish
from dfm.samplers.state import FlowState, Query, Step


@dataclass(frozen=True)
class Adaptive:
    """The steps of ``inner``, each cut at the time up to which its jump probabilities sum to at most 1.

    The grid of ``inner`` gives the longest steps; every sequence has its own times. With Euler the bound is
    s - t <= 1 / (largest exit rate), with Corrector kappa_s - kappa_t <= 1 / ((1 + beta)/(1 - kappa) + beta/kappa)
    (step bound of arXiv 2407.15595). ``least`` keeps steps from vanishing where beta/kappa is large: they are at least
    that long, and the inner sampler cuts its probabilities there.
    """

    inner: Euler | Corrector
    least: float = 1e-3

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.inner.next_time(state)
        p1 = yield Query(state.x, state.t, state.masked)
        farthest = torch.maximum(self.inner.farthest(state, p1), state.t + self.least)
        s = torch.minimum(s, farthest)
        state.draw(finish(self.inner.law(state, p1, s), p1, s), draws, self.inner.path.source.mask_id)
        state.advance(s, self.inner.grid[-1])
