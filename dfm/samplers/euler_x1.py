"""Euler-like steps given x1, with the exact probability of leaving at constant rates.

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dfm.samplers.given_data import GivenDataSampler
from dfm.samplers.rates import forward_hazard, free_rates, leap_law
from dfm.samplers.state import FlowState
from dfm.velocity import Velocity


@dataclass(frozen=True)
class EulerX1(GivenDataSampler):
    """Jump with 1 - exp(-(s - t) lambda) to u / lambda: u the rates of ``velocity`` given x1, lambda their sum."""

    velocity: Velocity

    def jump_probability(self, state: FlowState, s: Tensor) -> Tensor | None:
        hazard = forward_hazard(self.velocity, state.t)
        return None if hazard is None else -torch.expm1(-(s - state.t) * hazard)

    def law_given(self, state: FlowState, x1: Tensor, s: Tensor) -> Tensor:
        rates = free_rates(self.velocity.at(state.x, x1, state.t), state)
        return leap_law(state.x, rates, s - state.t, "first")
