"""Tau-leaping: the marginal rates are held during a step, in which a token may be hit by several jumps.

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from decoding.checks import check_choice
from dfm.samplers.grid import LawSampler
from dfm.samplers.rates import free_rates, leap_law
from dfm.samplers.state import FlowState
from dfm.velocity import Velocity


@dataclass(frozen=True)
class TauLeap(LawSampler):
    """Jumps to every token v during a step are N_v ~ Poisson((s - t) u_v), where u is the marginal of ``velocity``.

    None: the token stays. One: it jumps. several: after more than one it stays ("reject") or the "first" counts.
    """

    velocity: Velocity
    several: Literal["reject", "first"] = "reject"

    def __post_init__(self):
        super().__post_init__()
        check_choice("several", self.several, ("reject", "first"))

    def law(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        rates = free_rates(self.velocity.marginal(state.x, state.t, p1), state)
        return leap_law(state.x, rates, s - state.t, self.several)
