"""Euler steps with classifier-free guidance of the rates or of the step's law instead of the logits.

Guidance of the logits needs no sampler of its own: it is an argument of :class:`dfm.samplers.loop.Posterior`.
Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from decoding.checks import check_choice, check_range
from dfm.draws import Draws
from dfm.guidance import guide_law, guide_rates
from dfm.samplers.euler import Euler
from dfm.samplers.grid import finish
from dfm.samplers.rates import euler_law, free_rates
from dfm.samplers.state import FlowState, Query, Step


@dataclass(frozen=True)
class GuidedEuler(Euler):
    """Euler with guidance weight w in ``place``: "law", "rates", or "rates-renormalised" (exit rates of the condition).

    Two evaluations a step; w = 0 is Euler with one. The last step to time 1 guides the law of x1.
    """

    weight: float = 1.0
    place: Literal["law", "rates", "rates-renormalised"] = "rates"

    def __post_init__(self):
        super().__post_init__()
        check_range("weight", self.weight, 0)
        check_choice("place", self.place, ("law", "rates", "rates-renormalised"))

    def step(self, state: FlowState, draws: Draws) -> Step:
        if self.weight == 0:
            yield from super().step(state, draws)
            return
        s = self.next_time(state)
        p1 = yield Query(state.x, state.t, state.masked)
        other = yield Query(state.x, state.t, state.masked, conditional=False)
        law = self.guided_law(state, p1, other, s)
        state.draw(finish(law, guide_law(p1, other, self.weight), s), draws, self.path.source.mask_id)
        state.advance(s, self.grid[-1])

    def guided_law(self, state: FlowState, p1: Tensor, other: Tensor, s: Tensor) -> Tensor:
        """[B, L, V] from the conditional and the unconditional posterior [B, L, V]."""
        if self.place == "law":
            return guide_law(self.law(state, p1, s), self.law(state, other, s), self.weight)
        conditional, unconditional = self.rates(state, p1), self.rates(state, other)
        renormalise = self.place == "rates-renormalised"
        rates = guide_rates(conditional, unconditional, state.x, self.weight, renormalise)
        return euler_law(state.x, free_rates(rates, state), s - state.t)
