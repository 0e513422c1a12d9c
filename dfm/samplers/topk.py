"""Revealing the best-scored masked tokens of each step, as many as the time asks for (MaskGIT, arXiv 2202.04200)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.checks import check_choice, check_range
from decoding.rules import ORDERS, Order, RowScores
from dfm.draws import Draws
from dfm.paths import MixturePath
from dfm.samplers.grid import GridSampler, kappas
from dfm.samplers.state import FlowState, Query, Step
from dfm.sources import check_mask


@dataclass(frozen=True)
class ScheduledTopK(GridSampler):
    """Reveal floor(n_masked (k' - k) / (1 - k)) tokens, at least 1, all in the last step.

    Positions are scored by their law, not by the token drawn: order is "confidence", "entropy" or "margin". With
    ``gumbel`` above 0 positions are drawn without replacement, with weights exp(score / gumbel) (Dream, arXiv
    2508.15487). A :class:`dfm.fit.FittedSchedule` as scheduler gives fitted numbers.
    ValueError for a source without mask token.
    """

    path: MixturePath
    order: Order = "confidence"
    gumbel: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("order", self.order, ORDERS)
        check_range("gumbel", self.gumbel, 0)
        check_mask(self.path.source, wanted=True)

    def quota(self, state: FlowState, s: Tensor) -> Tensor:
        """How many tokens to reveal [B]."""
        left = (state.masked & state.free).sum(-1)
        k, k_next = kappas(self.path.scheduler.shared(), state.t, s, state.t)
        share = ((k_next - k) / (1 - k))[:, 0, 0].nan_to_num(1)
        # A share that is a whole number of tokens must not lose one to rounding.
        count = (left * share + 1e-9).floor().long().clamp_min(1)
        return torch.where(s >= self.grid[-1], left, count)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        p1 = yield Query(state.x, state.t, state.masked)
        left = state.masked & state.free
        cost = RowScores.of(p1.log()).cost(self.order)
        if self.gumbel:
            cost = cost + self.gumbel * (-draws.uniform(left).log()).log()
        revealed = best(cost, left, self.quota(state, s))
        state.write(draws.categorical(p1, revealed), revealed)
        state.advance(s, self.grid[-1])


def best(cost: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """[B, L] bool: the ``count`` [B] positions of least ``cost`` [B, L] among those in ``among`` [B, L] bool."""
    order = cost.masked_fill(~among, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count[:, None]) & among
