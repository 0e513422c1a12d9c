"""Prediction with the finite-step kernel.

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from dfm.kernels import Routes, forward_kernel
from dfm.samplers.grid import is_shared, kappas
from dfm.samplers.kernel import KernelSampler
from dfm.samplers.state import FlowState


@dataclass(frozen=True)
class ExactX1(KernelSampler):
    """To x1 with probability (k' - k) / (1 - k); with a mask source ancestral sampling (MDLM, arXiv 2406.07524)."""

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        return forward_kernel(k, k_next)

    def jump_probability(self, state: FlowState, s: Tensor) -> Tensor | None:
        scheduler = self.path.scheduler
        if not is_shared(scheduler):
            return None
        k, k_next = scheduler.kappa(state.t), scheduler.kappa(s)
        return (k_next - k) / (1 - k)

    def law(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        # Needs no law of the source, so that it serves coupled sources too.
        k, k_next = kappas(self.path.scheduler, state.t, s, p1)
        return self.routes(state, k, k_next).law(state.x, p1, p1.new_zeros(p1.shape[-1]))
