"""Reveal rules for sources without mask token: the whole canvas is judged anew in every step (arXiv 2505.24857)."""

from dataclasses import dataclass

import torch

from decoding.checks import check_count
from decoding.rules import RevealRule, RowScores
from dfm.draws import Draws
from dfm.paths import MixturePath
from dfm.samplers.state import FlowState, Query, Step
from dfm.sources import check_mask


@dataclass(frozen=True)
class CanvasRule:
    """x1 ~ p_1t at every position; those that ``rule`` accepts keep it, the rest is drawn from the source again.

    Done when all are accepted, or after ``max_evaluations``, the last of which accepts all. The time, which the network
    sees, is the one at which kappa is the share of accepted positions.
    """

    path: MixturePath
    rule: RevealRule
    max_evaluations: int = 64

    def __post_init__(self):
        check_mask(self.path.source, wanted=False)
        check_count("max_evaluations", self.max_evaluations)

    def step(self, state: FlowState, draws: Draws) -> Step:
        p1 = yield Query(state.x, state.t, state.masked)
        free, last = state.free, (state.evaluations >= self.max_evaluations)[:, None]
        accepted = (self.rule(RowScores.of(p1.log()), free) | last) & free
        drawn = draws.categorical(p1, accepted)
        state.write(self.path.source.fill(drawn, free & ~accepted, draws), free)
        share = accepted.sum(-1) / free.sum(-1).clamp_min(1).double()
        state.t = torch.where(state.done, state.t, self.path.scheduler.shared().inverse(share))
        state.done = state.done | (accepted == free).all(-1)
