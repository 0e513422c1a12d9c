"""Path planning for mask sources: every step chooses anew which tokens stay revealed (P2, arXiv 2502.03540)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.checks import check_range
from dfm.draws import Draws
from dfm.paths import MixturePath
from dfm.samplers.grid import GridSampler
from dfm.samplers.state import FlowState, Query, Step
from dfm.samplers.topk import best
from dfm.sources import check_mask


@dataclass(frozen=True)
class P2(GridSampler):
    """Draw x1 at every masked position, score all free positions, keep the best floor(k' n_free), mask the others.

    planner: scores [B, L] of the full drafts x1 [B, L], state.masked telling which tokens are new. None: a token's
        score is its probability in the law that the network gives at its position, also if it is revealed there.
    eta: factor on the scores of tokens that were revealed before.
    ValueError for a source without mask token.
    """

    path: MixturePath
    eta: float = 1.0
    planner: Callable[[Tensor, FlowState], Tensor] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_range("eta", self.eta, 0)
        check_mask(self.path.source, wanted=True)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        p1 = yield Query(state.x, state.t, state.masked, carry_over=False)
        new = state.masked & state.free
        x1 = torch.where(new, draws.categorical(p1, new), state.x)
        score = p1.gather(-1, x1[..., None])[..., 0] if self.planner is None else self.planner(x1, state)
        score = torch.where(new, score, self.eta * score)
        share = self.path.scheduler.shared().kappa(s)
        keep = best(-score, state.free, (share * state.free.sum(-1) + 1e-9).floor().long())
        state.write(x1, keep)
        state.remask(~keep, self.path.source.mask_id)
        state.advance(s, self.grid[-1])
