"""The metric path: from noise to data through ever nearer tokens (arXiv 2412.03487)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dfm.draws import Draws
from dfm.paths.beta_schedules import BetaSchedule
from dfm.paths.path import Noised, Path, per_position
from dfm.paths.sources import Source


@dataclass(frozen=True)
class MetricPath(Path):
    """p_t(x | x1) ~ p(x) exp(-beta_t d(x, x1)): from the source distribution p to the data through ever nearer tokens.

    distance: x1 [...] -> d [..., V], the distances of all tokens to the data tokens in use, 0 at x1 and above 0
    elsewhere. The source must give every data token a positive probability (UniformSource: the path of arXiv
    2412.03487).
    """

    source: Source
    schedule: BetaSchedule
    distance: Callable[[Tensor], Tensor]

    def at_beta(self, distances: Tensor, beta: Tensor) -> Tensor:
        """p_beta [..., V] for distances [..., V] and beta [..., 1], which may be infinite."""
        # infinity times the distance 0 is not a number
        cost = torch.where(distances > 0, beta * distances, 0)
        return (self.source.probabilities(distances).log() - cost).softmax(-1)

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, draws: Draws) -> Noised:
        tokens = draws.categorical(self.marginal(x1, t.double()), torch.ones_like(x1, dtype=torch.bool))
        return Noised(tokens, tokens != x1)

    def marginal(self, x1: Tensor, t: Tensor) -> Tensor:
        beta = self.schedule.at(x1).beta(per_position(t))
        return self.at_beta(self.distance(x1).to(t), beta[..., None].expand(*x1.shape, 1))

    def dmarginal(self, x1: Tensor, t: Tensor) -> Tensor:
        distances, distribution = self.distance(x1).to(t), self.marginal(x1, t)
        dbeta = self.schedule.at(x1).dbeta(per_position(t))[..., None]
        return dbeta * distribution * ((distribution * distances).sum(-1, keepdim=True) - distances)


@dataclass(frozen=True, eq=False)
class EmbeddingDistance:
    """d(x, x1) = |e_x - e_x1|^4 of normalised rows of a token embedding [V, D], as in FUDOKI.

    Equal rows are at distance 0: the path then ends in a distribution over both tokens.
    """

    embedding: Tensor

    def __call__(self, x1: Tensor) -> Tensor:
        """[..., V] for data tokens [...]; nothing of the size V x V is built."""
        rows = normalize(self.embedding, dim=-1)
        squared = (2 - 2 * rows[x1] @ rows.T).clamp_min(0)
        return squared.scatter(-1, x1[..., None], 0) ** 2
