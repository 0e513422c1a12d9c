"""Samplers that take the finite-step kernels of mixture paths: exact given x1 for any step size.

Shapes: B sequences, L positions, V vocabulary.
"""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from dfm.kernels import Routes
from dfm.paths import MixturePath
from dfm.samplers.grid import LawSampler, kappas
from dfm.samplers.state import FlowState


@dataclass(frozen=True)
class KernelSampler(LawSampler):
    """x1 ~ p_1t and one of the kernels of :mod:`dfm.kernels`, as one law."""

    path: MixturePath

    @abstractmethod
    def routes(self, state: FlowState, k: Tensor, k_next: Tensor) -> Routes:
        """The kernel from kappa k to k_next, both [B, 1, 1] or [B, 1, V]."""

    def law(self, state: FlowState, p1: Tensor, s: Tensor) -> Tensor:
        k, k_next = kappas(self.path.scheduler, state.t, s, p1)
        return self.routes(state, k, k_next).law(state.x, p1, self.path.source.probabilities(p1))
