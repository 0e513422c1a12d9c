"""Ancestral sampling of a mask source that masks some revealed tokens again (ReMDM, arXiv 2503.00307).

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.checks import check_choice, check_range
from dfm.draws import Draws
from dfm.kernels import Routes, remask_kernel
from dfm.paths import MixturePath
from dfm.samplers.grid import finish, time_grid
from dfm.samplers.kernel import KernelSampler
from dfm.samplers.state import FlowState, Query, Step
from dfm.schedulers import PiecewiseLinearScheduler
from dfm.sources import MaskSource, check_mask

VARIANTS = ("cap", "rescale", "confidence")


@dataclass(frozen=True)
class ReMDM(KernelSampler):
    """Revealed -> mask with probability sigma, mask -> x1 with (k' - (1 - sigma) k) / (1 - k).

    With sigma_max = min(1, (1 - k') / k) the variants are
    cap: sigma = min(eta, sigma_max), e.g. eta 0.008 at 1024 steps; rescale: sigma = eta sigma_max, e.g. 0.015;
    confidence: eta sigma_max softmax(-c) over the revealed positions, c the probability of the token when it was
    revealed. Outside the times ``window`` sigma is 0. ValueError for a source without mask token.
    """

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
        state.draw(finish(self.law(state, p1, s), p1, s), draws, self.path.source.mask_id)
        probability = p1.gather(-1, state.x[..., None])[..., 0].double()
        state.confidence = torch.where(masked & ~state.masked, probability, state.confidence)
        state.advance(s, self.grid[-1])
