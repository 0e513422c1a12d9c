"""Revealing masked tokens by a rule of decoding/rules.py: entropy bound, confidence threshold or factor, top-k."""

from dataclasses import dataclass

import torch

from decoding.rules import RevealRule, RowScores
from dfm.draws import Draws
from dfm.samplers.state import FlowState, Query, Step
from dfm.sources import MaskSource, check_mask


@dataclass(frozen=True)
class RuleSampler:
    """Each step reveals the tokens that ``rule`` accepts, at least one, each drawn from its own law, until all are.

    There is no clock: the time is reported as the share of the free positions that is revealed.
    """

    source: MaskSource
    rule: RevealRule

    def __post_init__(self):
        check_mask(self.source, wanted=True)

    def step(self, state: FlowState, draws: Draws) -> Step:
        p1 = yield Query(state.x, state.t, state.masked)
        left = state.masked & state.free
        revealed = self.rule(RowScores.of(p1.log()), left)
        state.write(draws.categorical(p1, revealed), revealed)
        left, free = state.masked & state.free, state.free
        state.t = torch.where(state.done, state.t, 1 - left.sum(-1) / free.sum(-1).clamp_min(1).double())
        state.done = state.done | ~left.any(-1)
