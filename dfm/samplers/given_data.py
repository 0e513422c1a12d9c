"""Samplers that draw x1 from the posterior first and then jump at the rates given x1.

Rates given x1 exist for every path, also where their posterior mean has no closed form. Shapes: B sequences, L
positions, V vocabulary.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dfm.draws import Draws
from dfm.paths import delta
from dfm.samplers.grid import LawSampler, finish
from dfm.samplers.state import FlowState, Query, Step


@dataclass(frozen=True)
class GivenDataSampler(LawSampler):
    """x1 ~ p_1t at every position, then X' ~ law_given(x1)."""

    @abstractmethod
    def law_given(self, state: FlowState, x1: Tensor, s: Tensor) -> Tensor:
        """[B, L, V] in the dtype of state.t, for the data tokens x1 [B, L]."""

    def law(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        """The two draws of a step as one law: sums over x1, so for small vocabularies only."""
        total = torch.zeros_like(p1)
        for token in range(p1.shape[-1]):
            total += p1[..., token, None] * self.law_given(state, torch.full_like(state.x, token), s).to(p1)
        return total

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        if self.jump_probability(state, s) is not None:
            yield from super().step(state, draws)
            return
        p1 = yield Query(state.x, state.t, state.masked)
        x1 = draws.categorical(p1, state.free)
        law = self.law_given(state, x1, s)
        law = finish(law, delta(x1, law.shape[-1], law), s)
        state.draw(law, draws, self.path.source.mask_id)
        state.advance(s, self.grid[-1])
