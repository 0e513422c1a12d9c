"""A flow sampler of one's own: reveal masked tokens from left to right, as many in each step as the grid has room for."""

from dataclasses import dataclass
from math import ceil
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
        s = self.next_time(state)
        p1 = yield Query(state.x, state.t, state.masked)
        steps_left = sum(time >= float(s[0]) for time in self.grid)
        left = state.masked & state.free
        count = ceil(int(left.sum()) / steps_left)
        revealed = left & (left.long().cumsum(-1) <= count)
        state.write(draws.categorical(p1, revealed), revealed)
        state.advance(torch.where(left.sum(-1) > count, s, torch.ones_like(s)), self.grid[-1])
