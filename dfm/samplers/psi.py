"""Psi-samplers: between the posterior step, which keeps what it can, and a fresh draw (arXiv 2602.21185).

Shapes: B sequences, L positions, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from decoding.checks import check_range
from dfm.kernels import Routes, reversal_kernel
from dfm.samplers.kernel import KernelSampler
from dfm.samplers.state import FlowState


@dataclass(frozen=True)
class Psi(KernelSampler):
    """x1 ~ p_1t, then with probability c from q(x_s | x_t, x1), else from q(x_s | x1) = k' delta_{x1} + (1 - k') p.

    keep: c in [0, 1]; 1 is D3PM's step. With a mask source c = clip(1 - sigma / (1 - k'), 0, 1) is ReMDM.
    """

    keep: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        check_range("keep", self.keep, 0, 1)

    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        kept = reversal_kernel(k, k_next, state.x, self.path.source.probabilities(k))
        fresh = Routes(k_next, 1 - k_next)
        return Routes(*(self.keep * a + (1 - self.keep) * b for a, b in zip(kept, fresh, strict=True)))
