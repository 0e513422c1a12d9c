"""First-hitting sampling of a mask source: one token an evaluation, with no error of time (arXiv 2409.02908)."""

from dataclasses import dataclass

import torch

from dfm.draws import Draws
from dfm.paths import MixturePath
from dfm.samplers.state import FlowState, Query, Step
from dfm.sources import check_mask


@dataclass(frozen=True)
class FirstHitting:
    """With n masks left the next is revealed at 1 - k' = (1 - k) U^(1/n), U ~ U(0, 1), at a position chosen uniformly.

    The tokens depend on the order, not on the times, if the network ignores time: random-order ancestral sampling.
    ValueError for a source without mask token.
    """

    path: MixturePath

    def __post_init__(self):
        check_mask(self.path.source, wanted=True)

    def step(self, state: FlowState, draws: Draws) -> Step:
        left = state.masked & state.free
        revealed = draws.pick(left)
        survival = draws.uniform(revealed).sum(-1) ** (1 / left.sum(-1).clamp_min(1))
        scheduler = self.path.scheduler.shared()
        k = scheduler.kappa(state.t)
        t = torch.where(state.done, state.t, scheduler.inverse(1 - (1 - k) * survival))
        p1 = yield Query(state.x, t, state.masked)
        state.write(draws.categorical(p1, revealed), revealed)
        state.t = t
        state.done = state.done | ~(state.masked & state.free).any(-1)
