"""Samplers that step with the finite-step kernels of mixture paths, exact given x1 for any step size; and correction."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice, check_count, check_range
from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PiecewiseLinearScheduler
from dfm.paths.sources import MaskSource, check_mask
from dfm.rates.kernels import (
    Routes,
    farthest_kappa,
    forward_kernel,
    frozen_kernel,
    largest_beta,
    mixed_kernel,
    remask_kernel,
    reversal_kernel,
)
from dfm.rates.velocities import CorrectorSchedule
from dfm.samplers.rates import Euler
from dfm.sampling.grid import DistributionSampler, finish, kappas, time_grid
from dfm.sampling.state import FlowState, Query, Sampler, Step


@dataclass(frozen=True)
class KernelSampler(DistributionSampler):
    """x1 ~ p_1t and one of the kernels of :mod:`dfm.rates.kernels`, as one distribution."""

    path: MixturePath

    @abstractmethod
    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        """The kernel from kappa k to k_next, both [B, 1, 1] or [B, 1, V]."""

    def distribution(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        k, k_next = kappas(self.path.scheduler, state.t, s, p1)
        return self.routes(state, k, k_next).distribution(state.x, p1, self.path.source.probabilities(p1))


@dataclass(frozen=True)
class ExactX1(KernelSampler):
    """To x1 with probability (k' - k) / (1 - k); with a mask source ancestral sampling (MDLM, arXiv 2406.07524)."""

    name = "exact"
    keeps = True

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        return forward_kernel(k, k_next)

    def jump_probability(self, state: FlowState, s: Tensor) -> Tensor | None:
        scheduler = self.path.scheduler
        if not scheduler.is_shared:
            return None
        k, k_next = scheduler.kappa(state.t), scheduler.kappa(s)
        return (k_next - k) / (1 - k)

    def distribution(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        # Needs no distribution of the source, so that it serves coupled sources too.
        k, k_next = kappas(self.path.scheduler, state.t, s, p1)
        return self.routes(state, k, k_next).distribution(state.x, p1, p1.new_zeros(p1.shape[-1]))


@dataclass(frozen=True)
class D3PM(KernelSampler):
    """The ancestral step q(x_s | x_t, x1) of the process that redraws tokens from the source (arXiv 2107.03006)."""

    name = "d3pm"
    keeps = True

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        return reversal_kernel(k, k_next, state.x, self.path.source.probabilities(k))


@dataclass(frozen=True)
class Psi(KernelSampler):
    """x1 ~ p_1t, then with probability c from q(x_s | x_t, x1), else from q(x_s | x1) = k' delta_{x1} + (1 - k') p.

    keep: c in [0, 1]; 1 is D3PM's step. With a mask source c = clip(1 - sigma / (1 - k'), 0, 1) is ReMDM.
    """

    name = "psi"

    keep: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        check_range("keep", self.keep, 0, 1)

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        kept = reversal_kernel(k, k_next, state.x, self.path.source.probabilities(k))
        fresh = Routes(k_next, 1 - k_next)
        return Routes(*(self.keep * a + (1 - self.keep) * b for a, b in zip(kept, fresh, strict=True)))


VARIANTS = ("cap", "rescale", "confidence")


@dataclass(frozen=True)
class ReMDM(KernelSampler):
    """Revealed -> mask with probability sigma, mask -> x1 with (k' - (1 - sigma) k) / (1 - k).

    With sigma_max = min(1, (1 - k') / k) the variants are
    cap: sigma = min(eta, sigma_max), e.g. eta 0.008 at 1024 steps; rescale: sigma = eta sigma_max, e.g. 0.015;
    confidence: eta sigma_max softmax(-c) over the revealed positions, c the probability of the token when it was
    revealed. Outside the times ``window`` sigma is 0. ValueError for a source without mask token.
    """

    name = "remdm"
    sources = ("mask",)

    variant: Literal["cap", "rescale", "confidence"] = "cap"
    eta: float = 0.008
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        super().__post_init__()
        check_choice("variant", self.variant, VARIANTS)
        check_range("eta", self.eta, 0, 1)
        check_range("window[0]", self.window[0], 0, self.window[1])
        check_range("window[1]", self.window[1], self.window[0], 1)
        check_mask(self.path.source, wanted=True)

    @classmethod
    def default(cls, path: MixturePath, grid: tuple[float, ...]) -> "ReMDM":
        return cls(path, grid, "rescale", 0.1)

    @classmethod
    def loop(cls, source: MaskSource, steps: int, eta: float = 0.02) -> "ReMDM":
        """The paper's loop: kappa rises to 0.9, is held while tokens are re-masked, t in (0.45, 0.95), goes to 1."""
        values = [0.1 * i for i in range(10)] + [0.9] * 10 + [1.0]
        path = MixturePath(source, PiecewiseLinearScheduler(tuple(values)))
        return cls(path, time_grid(steps), "cap", eta, window=(0.45, 0.95))

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        return remask_kernel(k, k_next, self.sigma(state, k, k_next))

    def sigma(self, state: FlowState, k: Tensor, k_next: Tensor) -> Tensor:
        """The probability of masking again, [B, 1, 1] or [B, L, 1]."""
        inside = (state.t >= self.window[0]) & (state.t < self.window[1])
        largest = ((1 - k_next) / k).clamp_max(1) * inside[:, None, None]
        if self.variant == "cap":
            return largest.clamp_max(self.eta)
        if self.variant == "rescale":
            return self.eta * largest
        revealed = state.free & ~state.masked
        # nan where nothing is revealed, and there sigma does not matter
        share = (-state.confidence).masked_fill(~revealed, -torch.inf).softmax(-1).nan_to_num(0)
        return self.eta * largest * share[..., None].to(k)

    def step(self, state: FlowState, draws: Draws) -> Step:
        s, masked = self.next_time(state), state.masked
        p1 = yield Query(state.x, state.t, state.masked)
        state.draw(finish(self.distribution(state, p1, s), p1, s), draws, self.path.source.mask_id)
        probability = p1.gather(-1, state.x[..., None])[..., 0].double()
        state.confidence = torch.where(masked & ~state.masked, probability, state.confidence)
        state.advance(s, self.grid[-1])


@dataclass(frozen=True)
class Corrector(KernelSampler):
    """Prediction and correction in one step: (1 + beta_t) forward - beta_t backward, as a finite-step kernel.

    beta_t is cut where the kernel would have no probabilities left (:func:`dfm.rates.kernels.largest_beta`), so beta is 0 at
    kappa = 0 and in the last step; :class:`Adaptive` shortens the step instead.
    """

    name = "corrector"

    beta: CorrectorSchedule = CorrectorSchedule()

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        limit = largest_beta(k, k_next, self.path.source.mask_id is not None)
        return mixed_kernel(k, k_next, torch.minimum(self.beta(state.t).to(k)[:, None, None], limit))

    def farthest(self, state: FlowState, p1: Tensor) -> Tensor:
        """The time [B] up to which beta_t need not be cut."""
        scheduler = self.path.scheduler.shared()
        k_next = farthest_kappa(scheduler.kappa(state.t), self.beta(state.t))
        return scheduler.inverse(k_next.clamp_max(1))


@dataclass(frozen=True)
class FrozenPass(Sampler):
    """One corrector pass at the time where the state is, which leaves p_t as it is: forward = backward rates.

    strength: in (0, 1], the share of the largest rate that still gives probabilities.
    """

    sources = ()  # moves no time, so alone it never ends

    path: MixturePath
    strength: float = 0.5

    def __post_init__(self):
        check_range("strength", self.strength, 0, 1, include_low=False)

    def step(self, state: FlowState, draws: Draws) -> Step:
        p1 = yield Query(state.x, state.t, state.masked)
        state.draw(self.distribution(state, p1), draws, self.path.source.mask_id)

    def distribution(self, state: FlowState, p1: Tensor) -> Tensor:
        """[B, L, V] of the next token of each position."""
        k, source = self.path.scheduler.kappa(state.t[:, None, None]).to(p1), self.path.source
        routes = frozen_kernel(k, self.strength, source.mask_id is not None)
        return routes.distribution(state.x, p1, source.probabilities(p1))


@dataclass(frozen=True)
class Corrected(Sampler):
    """A sampler with ``passes`` steps of a corrector after each of its steps; each costs the corrector's evaluations.

    corrector: FrozenPass or LooGibbs, which do not move the time.
    """

    sources = ()  # of two other samplers

    predictor: Sampler
    corrector: Sampler
    passes: int = 1

    def __post_init__(self):
        check_count("passes", self.passes)

    def step(self, state: FlowState, draws: Draws) -> Step:
        yield from self.predictor.step(state, draws)
        for _ in range(self.passes):
            if not state.done.all():
                yield from self.corrector.step(state, draws)


@dataclass(frozen=True)
class Adaptive(Sampler):
    """The steps of ``inner``, each cut at the time up to which its jump probabilities sum to at most 1.

    The grid of ``inner`` gives the longest steps; every sequence has its own times. With Euler the bound is
    s - t <= 1 / (largest exit rate), with Corrector kappa_s - kappa_t <= 1 / ((1 + beta)/(1 - kappa) + beta/kappa)
    (step bound of arXiv 2407.15595). ``least`` keeps steps from vanishing where beta/kappa is large: they are at least
    that long, and the inner sampler cuts its probabilities there. With the default Corrector the bound decides, not the
    grid: 45, 52, 71 and 144 evaluations for 4, 8, 32 and 128 even steps of a linear kappa.
    """

    name = "adaptive"

    inner: Euler | Corrector
    least: float = 1e-3

    @classmethod
    def default(cls, path: MixturePath, grid: tuple[float, ...]) -> "Adaptive":
        return cls(Corrector(path, grid))

    def step(self, state: FlowState, draws: Draws) -> Step:
        s = self.inner.next_time(state)
        p1 = yield Query(state.x, state.t, state.masked)
        farthest = torch.maximum(self.inner.farthest(state, p1), state.t + self.least)
        s = torch.minimum(s, farthest)
        state.draw(finish(self.inner.distribution(state, p1, s), p1, s), draws, self.inner.path.source.mask_id)
        state.advance(s, self.inner.grid[-1])
