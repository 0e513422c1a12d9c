"""Samplers that step with rates: Euler, tau-leaping, the theta-trapezoidal method, and classifier-free guidance
of the rates or of the distribution of a step.

Guidance of the logits needs no sampler of its own: it is an argument of :class:`dfm.sampling.loop.Posterior`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice, check_range
from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.rates.guidance import guide_distribution, guide_rates
from dfm.rates.velocities import ForwardVelocity, Velocity
from dfm.sampling.distributions import at_most_one, euler_distribution, forward_hazard, free_rates, leap_distribution
from dfm.sampling.grid import DistributionSampler, GivenDataSampler, finish
from dfm.sampling.state import FlowState, Query, Sampler, Step


class OnForwardVelocity:
    """By default with the forward velocity of the path."""

    @classmethod
    def default(cls, path: MixturePath, grid: tuple[float, ...]) -> "Sampler":
        return cls(path, grid, ForwardVelocity(path))


@dataclass(frozen=True)
class Euler(OnForwardVelocity, DistributionSampler):
    """X' ~ delta_X + (s - t) u(., X), where u is the marginal of ``velocity`` (arXiv 2407.15595).

    Where the jump probabilities sum to more than 1 they are scaled to 1, with a warning. ValueError for rates that are
    negative or infinite.
    """

    name = "euler"
    keeps = True

    velocity: Velocity

    def jump_probability(self, state: FlowState, s: Tensor) -> Tensor | None:
        hazard = forward_hazard(self.velocity, state.t)
        return None if hazard is None else at_most_one((s - state.t) * hazard)

    def distribution(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        return euler_distribution(state.x, self.rates(state, p1), s - state.t)

    def rates(self, state: FlowState, p1: Tensor) -> Tensor:
        return free_rates(self.velocity.marginal(state.x, state.t, p1), state)

    def farthest(self, state: FlowState, p1: Tensor) -> Tensor:
        """The time [B] up to which all jump probabilities sum to at most 1: t + 1 / (largest exit rate)."""
        exit_rate = self.rates(state, p1).sum(-1).amax(-1)
        return state.t + 1 / exit_rate.double()


@dataclass(frozen=True)
class EulerX1(OnForwardVelocity, GivenDataSampler):
    """Jump with 1 - exp(-(s - t) lambda) to u / lambda: u the rates of ``velocity`` given x1, lambda their sum."""

    name = "euler_x1"
    keeps = True

    velocity: Velocity

    def jump_probability(self, state: FlowState, s: Tensor) -> Tensor | None:
        hazard = forward_hazard(self.velocity, state.t)
        return None if hazard is None else -torch.expm1(-(s - state.t) * hazard)

    def distribution_given(self, state: FlowState, x1: Tensor, s: Tensor) -> Tensor:
        rates = free_rates(self.velocity.at(state.x, x1, state.t), state)
        return leap_distribution(state.x, rates, s - state.t, "first")


@dataclass(frozen=True)
class TauLeap(OnForwardVelocity, DistributionSampler):
    """Jumps to every token v during a step are N_v ~ Poisson((s - t) u_v), where u is the marginal of ``velocity``.

    None: the token stays. One: it jumps. several: after more than one it stays ("reject") or the "first" counts.
    """

    name = "tau_leap"
    keeps = True

    velocity: Velocity
    several: Literal["reject", "first"] = "reject"

    def __post_init__(self):
        super().__post_init__()
        check_choice("several", self.several, ("reject", "first"))

    def distribution(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        rates = free_rates(self.velocity.marginal(state.x, state.t, p1), state)
        return leap_distribution(state.x, rates, s - state.t, self.several)


@dataclass(frozen=True)
class ThetaTrapezoidal(OnForwardVelocity, DistributionSampler):
    """Over a step h = s - t, with u the marginal rates of ``velocity`` and tau-leaping that keeps the first jump:

    1. x_mid from x_t over theta h at the rates u_t(x_t);
    2. x_s from x_mid over (1 - theta) h at the rates pos(a1 u_{t + theta h}(x_mid) - a2 u_t(x_t)), where
       a1 = 1 / (2 theta (1 - theta)), a2 = ((1 - theta)^2 + theta^2) / (2 theta (1 - theta)), so that a1 - a2 = 1.

    With a mask source, positions revealed in x_mid stay.
    """

    name = "theta_trapezoidal"
    keeps = True

    velocity: Velocity
    theta: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_range("theta", self.theta, 0, 1, include_low=False, include_high=False)

    def distribution(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        """Of the first half, to x_mid."""
        return leap_distribution(state.x, self.rates(state, state.t, p1), self.theta * (s - state.t), "first")

    def second_distribution(self, mid: FlowState, start_rates: Tensor, mid_rates: Tensor, s: Tensor) -> Tensor:
        """Of the second half [B, L, V]: from x_mid, with the jump rates [B, L, V] at x_t and x_mid."""
        theta = self.theta
        a1, a2 = 1 / (2 * theta * (1 - theta)), ((1 - theta) ** 2 + theta**2) / (2 * theta * (1 - theta))
        rates = (a1 * mid_rates - a2 * start_rates).clamp_min(0).scatter(-1, mid.x[..., None], 0)
        if self.path.source.mask_id is not None:
            rates = torch.where(mid.masked[..., None], rates, 0)
        return leap_distribution(mid.x, rates, (1 - theta) * (s - mid.t), "first")

    def rates(self, state: FlowState, t: Tensor, p1: Tensor) -> Tensor:
        return free_rates(self.velocity.marginal(state.x, t, p1), state)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.next_time(state)
        t = state.t
        p1 = yield Query(state.x, t, state.masked)
        start_rates = self.rates(state, t, p1)
        state.draw(self.distribution(state, p1, s), draws, self.path.source.mask_id)
        t_mid = t + self.theta * (s - t)
        p1 = yield Query(state.x, t_mid, state.masked)
        distribution = self.second_distribution(state, start_rates, self.rates(state, t_mid, p1), s)
        state.draw(finish(distribution, p1, s), draws, self.path.source.mask_id)
        state.advance(s, self.grid[-1])


@dataclass(frozen=True)
class GuidedEuler(Euler):
    """Euler with guidance weight w in ``place``: "distribution", "rates", or "rates-renormalised" (exit rates of the
    condition).

    Two evaluations a step; w = 0 is Euler with one. The last step to time 1 guides the distribution of x1.
    """

    name = ""
    sources = ()  # asks a second model, which no decoder has

    weight: float = 1.0
    place: Literal["distribution", "rates", "rates-renormalised"] = "rates"

    def __post_init__(self):
        super().__post_init__()
        check_range("weight", self.weight, 0)
        check_choice("place", self.place, ("distribution", "rates", "rates-renormalised"))

    def step(self, state: FlowState, draws: Draws) -> Step:
        if self.weight == 0:
            yield from super().step(state, draws)
            return
        s = self.next_time(state)
        p1 = yield Query(state.x, state.t, state.masked)
        other = yield Query(state.x, state.t, state.masked, conditional=False)
        distribution = self.guided_distribution(state, p1, other, s)
        state.draw(finish(distribution, guide_distribution(p1, other, self.weight), s), draws, self.path.source.mask_id)
        state.advance(s, self.grid[-1])

    def guided_distribution(self, state: FlowState, p1: Tensor, other: Tensor, s: Tensor) -> Tensor:
        """[B, L, V] from the conditional and the unconditional posterior [B, L, V]."""
        if self.place == "distribution":
            return guide_distribution(self.distribution(state, p1, s), self.distribution(state, other, s), self.weight)
        conditional, unconditional = self.rates(state, p1), self.rates(state, other)
        renormalise = self.place == "rates-renormalised"
        rates = guide_rates(conditional, unconditional, state.x, self.weight, renormalise)
        return euler_distribution(state.x, free_rates(rates, state), s - state.t)
