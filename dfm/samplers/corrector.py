"""Correction: tokens may be taken back to noise, in the step itself or in passes at a frozen time.

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.checks import check_count, check_range
from dfm.draws import Draws
from dfm.kernels import Routes, farthest_kappa, frozen_kernel, largest_beta, mixed_kernel
from dfm.paths import MixturePath
from dfm.samplers.kernel import KernelSampler
from dfm.samplers.state import FlowState, Query, Sampler, Step
from dfm.velocity import CorrectorSchedule


@dataclass(frozen=True)
class Corrector(KernelSampler):
    """Prediction and correction in one step: (1 + beta_t) forward - beta_t backward, as a finite-step kernel.

    beta_t is cut where the kernel would have no probabilities left (:func:`dfm.kernels.largest_beta`), so beta is 0 at
    kappa = 0 and in the last step; :class:`dfm.samplers.adaptive.Adaptive` shortens the step instead.
    """

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
class FrozenPass:
    """One corrector pass at the time where the state is, which leaves p_t as it is: forward = backward rates.

    strength: in (0, 1], the share of the largest rate that still gives probabilities.
    """

    path: MixturePath
    strength: float = 0.5

    def __post_init__(self):
        check_range("strength", self.strength, 0, 1, include_low=False)

    def step(self, state: FlowState, draws: Draws) -> Step:
        p1 = yield Query(state.x, state.t, state.masked)
        state.draw(self.law(state, p1), draws, self.path.source.mask_id)

    def law(self, state: FlowState, p1: Tensor) -> Tensor:
        """[B, L, V] of the next token of each position."""
        k, source = self.path.scheduler.kappa(state.t[:, None, None]).to(p1), self.path.source
        routes = frozen_kernel(k, self.strength, source.mask_id is not None)
        return routes.law(state.x, p1, source.probabilities(p1))


@dataclass(frozen=True)
class Corrected:
    """A sampler with ``passes`` steps of a corrector after each of its steps; each costs the corrector's evaluations.

    corrector: FrozenPass or LooGibbs, which do not move the time.
    """

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
