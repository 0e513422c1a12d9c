"""The theta-trapezoidal method: second order in the step size at two evaluations a step (arXiv 2502.00234).

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.checks import check_range
from dfm.draws import Draws
from dfm.samplers.grid import LawSampler, finish
from dfm.samplers.rates import free_rates, leap_law
from dfm.samplers.state import FlowState, Query, Step
from dfm.velocity import Velocity


@dataclass(frozen=True)
class ThetaTrapezoidal(LawSampler):
    """Over a step h = s - t, with u the marginal rates of ``velocity`` and tau-leaping that keeps the first jump:

    1. x_mid from x_t over theta h at the rates u_t(x_t);
    2. x_s from x_mid over (1 - theta) h at the rates pos(a1 u_{t + theta h}(x_mid) - a2 u_t(x_t)), where
       a1 = 1 / (2 theta (1 - theta)), a2 = ((1 - theta)^2 + theta^2) / (2 theta (1 - theta)), so that a1 - a2 = 1.

    With a mask source, positions revealed in x_mid stay.
    """

    velocity: Velocity
    theta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_range("theta", self.theta, 0, 1, include_low=False, include_high=False)

    def law(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        """Of the first half, to x_mid."""
        return leap_law(state.x, self.rates(state, state.t, p1), self.theta * (s - state.t), "first")

    def second_law(self, mid: FlowState, start_rates: Tensor, mid_rates: Tensor, s: Tensor) -> Tensor:
        """Of the second half [B, L, V]: from x_mid, with the jump rates [B, L, V] at x_t and x_mid."""
        theta = self.theta
        a1, a2 = 1 / (2 * theta * (1 - theta)), ((1 - theta) ** 2 + theta**2) / (2 * theta * (1 - theta))
        rates = (a1 * mid_rates - a2 * start_rates).clamp_min(0).scatter(-1, mid.x[..., None], 0)
        if self.path.source.mask_id is not None:
            rates = torch.where(mid.masked[..., None], rates, 0)
        return leap_law(mid.x, rates, (1 - theta) * (s - mid.t), "first")

    def rates(self, state: FlowState, t: Tensor, p1: Tensor) -> Tensor:
        return free_rates(self.velocity.marginal(state.x, t, p1), state)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        t = state.t
        p1 = yield Query(state.x, t, state.masked)
        start_rates = self.rates(state, t, p1)
        state.draw(self.law(state, p1, s), draws, self.path.source.mask_id)
        t_mid = t + self.theta * (s - t)
        p1 = yield Query(state.x, t_mid, state.masked)
        law = self.second_law(state, start_rates, self.rates(state, t_mid, p1), s)
        state.draw(finish(law, p1, s), draws, self.path.source.mask_id)
        state.advance(s, self.grid[-1])
