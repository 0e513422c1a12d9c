"""Samplers that rank positions by their distributions and decide the best ones: schedules, reveal rules, planning, Gibbs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice, check_count, check_range
from decoding.rules import ORDERS, Order, RevealRule, RowScores
from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.sources import MaskSource, check_mask
from dfm.rates.posterior import leave_one_out
from dfm.samplers.kernels import Corrected, ExactX1
from dfm.sampling.grid import GridSampler, kappas
from dfm.sampling.state import FlowState, Query, Sampler, Step


@dataclass(frozen=True)
class ScheduledTopK(GridSampler):
    """Reveal floor(n_masked (k' - k) / (1 - k)) tokens, at least 1, all in the last step (MaskGIT, arXiv 2202.04200).

    Positions are scored by their distribution, not by the token drawn: order is "confidence", "entropy" or "margin". With
    ``gumbel`` above 0 positions are drawn without replacement, with weights exp(score / gumbel) (Dream, arXiv
    2508.15487). A :class:`dfm.paths.fit.FittedSchedule` as scheduler gives fitted numbers.
    ValueError for a source without mask token.
    """

    name = "topk"
    sources = ("mask",)
    keeps = True
    ranks_positions = True

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
        left = state.masked & state.free
        p1 = yield Query(state.x, state.t, state.masked, only=left)
        cost = torch.zeros(left.shape, device=p1.device).masked_scatter(left, cost_of(p1, self.order))
        if self.gumbel:
            cost = cost + self.gumbel * (-draws.uniform(left).log()).log()
        revealed = best(cost, left, self.quota(state, s))
        state.write(draws.rows(p1[revealed[left]], revealed), revealed)
        state.advance(s, self.grid[-1])


def cost_of(p1: Tensor, order: Order) -> Tensor:
    """``RowScores.of(p1.log()).cost(order)`` [N] of distributions [N, V], for the default order without the passes
    for the others.
    """
    if order != "confidence":
        return RowScores.of(p1.log()).cost(order)
    return -p1.float().log().log_softmax(-1).amax(-1).exp()


def row_scores(p1: Tensor, where: Tensor) -> RowScores:
    """What rules look at, [B, L], from the distributions [N, V] of the positions ``where`` [B, L] bool; others are certain."""
    scores, certain = RowScores.of(p1.log()), where.logical_not().float()

    def spread(values: Tensor, elsewhere: Tensor) -> Tensor:
        return elsewhere.masked_scatter(where, values)

    return RowScores(
        spread(scores.entropy, torch.zeros_like(certain)),
        spread(scores.confidence, certain),
        spread(scores.margin, certain),
    )


def best(cost: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """[B, L] bool: the ``count`` [B] positions of least ``cost`` [B, L] among those in ``among`` [B, L] bool."""
    order = cost.masked_fill(~among, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < count[:, None]) & among


@dataclass(frozen=True)
class RuleSampler(Sampler):
    """Each step reveals the tokens that ``rule`` accepts, at least one, each drawn from its own distribution, until all are
    (:mod:`decoding.rules`: entropy bound, confidence threshold or factor, top-k).

    There is no clock: the time is reported as the share of the free positions that is revealed.
    """

    sources = ("mask",)
    on_grid = False
    keeps = True
    ranks_positions = True

    source: MaskSource
    rule: RevealRule

    def __post_init__(self):
        check_mask(self.source, wanted=True)

    def step(self, state: FlowState, draws: Draws) -> Step:
        left = state.masked & state.free
        p1 = yield Query(state.x, state.t, state.masked, only=left)
        revealed = self.rule(row_scores(p1, left), left)
        state.write(draws.rows(p1[revealed[left]], revealed), revealed)
        left, free = state.masked & state.free, state.free
        state.t = torch.where(state.done, state.t, 1 - left.sum(-1) / free.sum(-1).clamp_min(1).double())
        state.done = state.done | ~left.any(-1)


@dataclass(frozen=True)
class CanvasRule(Sampler):
    """x1 ~ p_1t at every position; those that ``rule`` accepts keep it, the rest is drawn from the source again
    (arXiv 2505.24857).

    Done when all are accepted, or after ``max_evaluations``, the last of which accepts all. The time, which the network
    sees, is the one at which kappa is the share of accepted positions.
    """

    sources = ("uniform",)
    on_grid = False
    ranks_positions = True

    path: MixturePath
    rule: RevealRule
    max_evaluations: int = 64

    def __post_init__(self):
        check_mask(self.path.source, wanted=False)
        check_count("max_evaluations", self.max_evaluations)

    def step(self, state: FlowState, draws: Draws) -> Step:
        free = state.free
        p1 = yield Query(state.x, state.t, state.masked, only=free)
        last = (state.evaluations >= self.max_evaluations)[:, None]
        accepted = (self.rule(row_scores(p1, free), free) | last) & free
        drawn = draws.rows(p1[accepted[free]], accepted)
        state.write(self.path.source.fill(drawn, free & ~accepted, draws), free)
        share = accepted.sum(-1) / free.sum(-1).clamp_min(1).double()
        state.t = torch.where(state.done, state.t, self.path.scheduler.shared().inverse(share))
        state.done = state.done | (accepted == free).all(-1)


def rule_sampler(path: MixturePath, rule: RevealRule) -> Sampler:
    """The sampler that follows a rule of :mod:`decoding.rules`, for either kind of source."""
    return RuleSampler(path.source, rule) if path.source.mask_id is not None else CanvasRule(path, rule)


@dataclass(frozen=True)
class P2(GridSampler):
    """Draw x1 at every masked position, score all free positions, keep the best floor(k' n_free), mask the others
    (P2, arXiv 2502.03540).

    planner: scores [B, L] of the full drafts x1 [B, L], state.masked telling which tokens are new. None: a token's
        score is its probability in the distribution that the network gives at its position, also if it is revealed there.
    eta: factor on the scores of tokens that were revealed before.
    ValueError for a source without mask token.
    """

    name = "p2"
    sources = ("mask",)
    ranks_positions = True

    path: MixturePath
    eta: float = 1.0
    planner: Callable[[Tensor, FlowState], Tensor] | None = None

    def __post_init__(self):
        super().__post_init__()
        check_range("eta", self.eta, 0)
        check_mask(self.path.source, wanted=True)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        free, new = state.free, state.masked & state.free
        p1 = yield Query(state.x, state.t, state.masked, carry_over=False, only=free)
        x1 = torch.where(new, draws.rows(p1[new[free]], new), state.x)
        if self.planner is None:
            score = torch.zeros(x1.shape).to(p1).masked_scatter(free, p1.gather(-1, x1[free][:, None]))
        else:
            score = self.planner(x1, state)
        score = torch.where(new, score, self.eta * score)
        share = self.path.scheduler.shared().kappa(s)
        keep = best(-score, free, (share * free.sum(-1) + 1e-9).floor().long())
        state.write(x1, keep)
        state.remask(~keep, self.path.source.mask_id)
        state.advance(s, self.grid[-1])


@dataclass(frozen=True)
class LooGibbs(Sampler):
    """Draw a site again from k g + (1 - k) p, where g is the distribution of its x1 given the other sites; the time stays.

    With one random site a pass leaves p_t invariant. Heuristics: several ``sites`` at once, which are drawn as if they
    were independent; choose = "least_confident", the sites whose token is the least likely under that distribution, which does
    not leave p_t invariant even for one site. Needs kappa < 1, and a source that gives every token in use a positive
    probability (arXiv 2605.22765). A corrector for :class:`dfm.samplers.kernels.Corrected`; by name, one of ExactX1.
    """

    name = "gibbs"
    sources = ("uniform",)

    path: MixturePath
    sites: int = 1
    choose: Literal["random", "least_confident"] = "random"

    def __post_init__(self):
        check_mask(self.path.source, wanted=False)
        check_count("sites", self.sites)
        check_choice("choose", self.choose, ("random", "least_confident"))

    @classmethod
    def default(cls, path: MixturePath, grid: tuple[float, ...]) -> Corrected:
        return Corrected(ExactX1(path, grid), cls(path))

    def step(self, state: FlowState, draws: Draws) -> Step:
        where = self.random_sites(state.free, draws) if self.choose == "random" else state.free
        p1 = yield Query(state.x, state.t, state.masked, only=where)
        z, source = state.x[where], self.path.source.probabilities(p1)
        k = self.path.scheduler.shared().kappa(state.t[:, None]).to(p1).expand_as(where)[where]
        distribution = k[:, None] * leave_one_out(p1.log(), z, k, source).softmax(-1) + (1 - k[:, None]) * source
        if self.choose == "least_confident":
            score = torch.zeros(where.shape).to(distribution).masked_scatter(where, distribution.gather(-1, z[:, None]))
            chosen = best(score, where, torch.full_like(state.evaluations, self.sites))
            distribution, where = distribution[chosen[where]], chosen
        state.write(draws.rows(distribution, where), where)

    def random_sites(self, free: Tensor, draws: Draws) -> Tensor:
        """[B, L] bool: ``sites`` of the positions ``free`` in each sequence, without replacement."""
        chosen = torch.zeros_like(free)
        for _ in range(self.sites):
            chosen = chosen | draws.pick(free & ~chosen)
        return chosen
