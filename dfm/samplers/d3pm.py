"""Ancestral steps of the process that redraws tokens from the source.

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from dfm.kernels import Routes, reversal_kernel
from dfm.samplers.kernel import KernelSampler
from dfm.samplers.state import FlowState


@dataclass(frozen=True)
class D3PM(KernelSampler):
    """The ancestral step q(x_s | x_t, x1) of the process that redraws tokens from the source (arXiv 2107.03006)."""

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        return reversal_kernel(k, k_next, state.x, self.path.source.probabilities(k))
