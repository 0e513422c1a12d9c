"""Transitions of a mask path with a chosen correlation, exact in many inner steps: GLASS flows (arXiv 2509.25170) on tokens.

Given x1 a position's pair (X_t, X_t') has the right marginals for one family of joint distributions alone: a revealed
token is masked again with probability sigma, and a masked one is revealed with r = (k' - (1 - sigma) k) / (1 - k), where k =
kappa_t and k' = kappa_t' (arXiv 2503.00307). Two masked views of one text tell as much as the union of their revealed
tokens, so the pair given the text so far is simulated from the same posterior network, without an effective time:

    1. choose R: every masked position with probability r
    2. fill R in M rounds, each given x_t and what the rounds before have filled
    3. only then mask the tokens that x_t had, each with probability sigma

With at least as many rounds as positions in R the text has the distribution p(x_t' | x_t) of the network's random-order
model; with one round it is ReMDM's step, and without masking again the ancestral one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.inputs.checks import check_count, check_range
from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.sources import check_mask
from dfm.sampling.grid import GridSampler, time_grid
from dfm.sampling.state import FlowState, Query, Step

INNER_STEPS = 4


@dataclass(frozen=True)
class Glass(GridSampler):
    """One transition for each interval of ``grid``, of ``inner_steps`` evaluations each.

    correlation: of "is revealed" at t and at t' given x1, as a share of the ancestral sampler's, which is the largest: 1 masks
        nothing again, at 0 the two are independent given x1, below 0 what was revealed is rather masked. It stands for
        sigma = (1 - correlation) (1 - k'), cut at min(1, (1 - k') / k), beyond which there is no pair.
    By name: ``steps`` evaluations in all, in transitions of 4, and half the ancestral correlation.
    ValueError for a source without mask token.
    """

    name = "glass"
    sources = ("mask",)

    path: MixturePath
    correlation: float = 0.5
    inner_steps: int = INNER_STEPS

    def __post_init__(self):
        super().__post_init__()
        check_range("correlation", self.correlation, -1, 1)
        check_count("inner_steps", self.inner_steps)
        check_mask(self.path.source, wanted=True)

    @classmethod
    def default(cls, path: MixturePath, grid: tuple[float, ...]) -> "Glass":
        steps = len(grid) - 1
        inner = min(INNER_STEPS, steps)
        return cls(path, time_grid(steps // inner, grid[-1]), inner_steps=inner)

    def probabilities(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """r and sigma [B] of the transition from the times t to s [B]."""
        scheduler = self.path.scheduler.shared()
        k, k_next = scheduler.kappa(t), scheduler.kappa(s)
        sigma = torch.minimum((1 - self.correlation) * (1 - k_next), ((1 - k_next) / k).clamp_max(1))
        reveal = (k_next - (1 - sigma) * k) / (1 - k)
        return torch.where(s >= 1, 1, reveal), torch.where(s >= 1, 0, sigma)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        reveal, sigma = self.probabilities(state.t, s)
        revealed = state.free & ~state.masked
        chosen = draws.happens(reveal, state.free & state.masked)
        for i, where in enumerate(self.rounds(chosen, draws)):
            t = state.t if i == 0 else self.time_of_round(i, state.t, reveal)
            p1 = yield Query(state.x, t, state.masked, only=where)
            state.write(draws.rows(p1, where), where)
        if self.correlation < 1:
            state.remask(draws.happens(sigma, revealed), self.path.source.mask_id)
        state.advance(s, self.grid[-1])

    def time_of_round(self, i: int, t: Tensor, reveal: Tensor) -> Tensor:
        """The time [B] at which as much is revealed as before round i, for networks that are told."""
        scheduler = self.path.scheduler.shared()
        k = scheduler.kappa(t)
        return scheduler.inverse(k + (1 - k) * reveal * i / self.inner_steps)

    def rounds(self, chosen: Tensor, draws: Draws) -> list[Tensor]:
        """The positions ``chosen`` [B, L] bool in random order, in ``inner_steps`` parts of (nearly) one size."""
        if self.inner_steps == 1:
            return [chosen]
        order = draws.uniform(chosen).masked_fill(~chosen, 2).argsort(dim=-1, stable=True)
        rank = order.argsort(dim=-1)
        part = rank * self.inner_steps // chosen.sum(-1, keepdim=True).clamp_min(self.inner_steps)
        return [chosen & (part == i) for i in range(self.inner_steps)]
