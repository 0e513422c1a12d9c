"""Steps of a model that was taught to land where its teacher needs several (arXiv 2509.04394, on tokens)."""

from dataclasses import dataclass

import torch

from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.sources import check_mask
from dfm.sampling.grid import GridSampler
from dfm.sampling.state import FlowState, Query, Step


@dataclass(frozen=True)
class Transition(GridSampler):
    """Ancestral steps whose network is told where the step leads and a random number for each masked token.

    What one draws is then independent given these numbers alone, so the tokens of a step need not be independent: the
    network knows all numbers, and one that was taught by :class:`dfm.TransitionObjective` makes its tokens agree. Any
    number of steps. ValueError for a source without mask token.
    """

    name = "transition"
    sources = ("mask",)
    keeps = True
    ranks_positions = True  # so that greedy draws are told, which take number 0: the teacher's likeliest tokens
    tells_target = True

    path: MixturePath

    def __post_init__(self):
        super().__post_init__()
        check_mask(self.path.source, wanted=True)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        scheduler, undecided = self.path.scheduler.shared(), state.free & state.masked
        k, k_next = scheduler.kappa(state.t), scheduler.kappa(s)
        revealed = draws.happens(torch.where(s >= 1, 1, (k_next - k) / (1 - k)), undecided)
        noise = draws.numbers(undecided)
        p1 = yield Query(state.x, state.t, state.masked, only=revealed, until=s, noise=noise)
        state.write(draws.rows(p1, revealed), revealed)
        state.advance(s, self.grid[-1])
