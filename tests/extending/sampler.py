"""A flow sampler of one's own: reveal masked tokens from left to right, as many in each step as the grid has room for."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dfm import Draws, FlowState, Query
from dfm.sampling.grid import GridSampler
from dfm.sampling.state import Step


@dataclass(frozen=True)
class LeftToRight(GridSampler):
    """The next ceil(masked / steps left) masked tokens from the left, each drawn from its posterior."""

    name: ClassVar[str] = "left_to_right"
    sources: ClassVar[tuple[str, ...]] = ("mask",)
    keeps: ClassVar[bool] = True

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)  # of each text: those of a batch need not be at the same time
        steps_left = (torch.tensor(self.grid).to(s) >= s[:, None]).sum(-1)
        left = state.masked & state.free
        count = (left.sum(-1) / steps_left).ceil()
        revealed = left & (left.cumsum(-1) <= count[:, None])
        p1 = yield Query(state.x, state.t, state.masked, only=revealed)
        state.write(draws.rows(p1, revealed), revealed)
        state.advance(torch.where(left.sum(-1) > count, s, 1), self.grid[-1])
