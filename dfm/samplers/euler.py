"""Euler steps with the marginal rates.

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from dfm.samplers.grid import LawSampler
from dfm.samplers.rates import at_most_one, euler_law, forward_hazard, free_rates
from dfm.samplers.state import FlowState
from dfm.velocity import Velocity


@dataclass(frozen=True)
class Euler(LawSampler):
    """X' ~ delta_X + (s - t) u(., X), where u is the marginal of ``velocity`` (arXiv 2407.15595).

    Where the jump probabilities sum to more than 1 they are scaled to 1, with a warning. ValueError for rates that are
    negative or infinite.
    """

    velocity: Velocity

    def jump_probability(self, state: FlowState, s: Tensor) -> Tensor | None:
        hazard = forward_hazard(self.velocity, state.t)
        return None if hazard is None else at_most_one((s - state.t) * hazard)

    def law(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        return euler_law(state.x, self.rates(state, p1), s - state.t)

    def rates(self, state: FlowState, p1: Tensor) -> Tensor:
        return free_rates(self.velocity.marginal(state.x, state.t, p1), state)

    def farthest(self, state: FlowState, p1: Tensor) -> Tensor:
        """The time [B] up to which all jump probabilities sum to at most 1: t + 1 / (largest exit rate)."""
        exit_rate = self.rates(state, p1).sum(-1).amax(-1)
        return state.t + 1 / exit_rate.double()
