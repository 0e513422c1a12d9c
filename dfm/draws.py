"""Random numbers with one generator per sequence, so that a batch draws what its sequences would draw alone.

Shapes: B sequences, L positions, V vocabulary. A sequence draws one number for each position asked for, in order of
position; positions that are not asked for (prompt, padding) cost none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.forward.transfer import to_device
from decoding.sampling import inverse_cdf

NUMBERS_AT_ONCE = 2**21  # drawing takes float64 copies of distributions, of so many numbers at a time


class Draws:
    """All randomness of a sampler goes through this class.

    generators: one for each sequence, on the CPU; the same one may stand for several sequences.
    """

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = list(generators)

    @classmethod
    def seeded(cls, *seeds: int) -> "Draws":
        """A sequence for each seed."""
        return cls([torch.Generator().manual_seed(seed) for seed in seeds])

    def categorical(self, distribution: Tensor, where: Tensor) -> Tensor:
        """Tokens [B, L] from ``distribution`` [B, L, V] at the positions ``where`` [B, L] bool, 0 elsewhere.

        Inverse CDF in float64: in float32 the tail of a large vocabulary is lost, which acts like a lower temperature
        (arXiv 2409.02908).
        """
        return self.rows(distribution.flatten(0, 1) if where.all() else distribution[where], where)

    def rows(self, distribution: Tensor, where: Tensor) -> Tensor:
        """As ``categorical``, with the distribution [N, V] of the positions ``where`` alone, in their order."""
        uniform, size = self._numbers(where), max(1, NUMBERS_AT_ONCE // distribution.shape[-1])
        if len(distribution) <= size:
            tokens = inverse_cdf(distribution, uniform)
        else:
            parts = zip(distribution.split(size), uniform.split(size), strict=True)
            tokens = torch.cat([inverse_cdf(*part) for part in parts])
        return torch.zeros(where.shape, dtype=torch.long, device=where.device).masked_scatter_(where, tokens)

    def happens(self, probability: Tensor, where: Tensor) -> Tensor:
        """bool [B, L]: true with ``probability`` [B] at the positions ``where`` [B, L] bool, false elsewhere."""
        return (self.uniform(where) < probability[:, None]) & where

    def unigram(self, distribution: Tensor, where: Tensor) -> Tensor:
        """Tokens [B, L] from one distribution [V] for all positions ``where`` [B, L] bool, 0 elsewhere."""
        cumulative = distribution.double().cumsum(0)
        tokens = torch.searchsorted(cumulative, self.uniform(where) * cumulative[-1], right=True)
        return torch.where(where, tokens.clamp_max(len(distribution) - 1), 0)

    def uniform(self, where: Tensor) -> Tensor:
        """float64 [B, L] in [0, 1) at the positions ``where`` [B, L] bool, 0 elsewhere."""
        zeros = torch.zeros(where.shape, dtype=torch.float64, device=where.device)
        return zeros.masked_scatter_(where, self._numbers(where))

    def numbers(self, where: Tensor) -> Tensor:
        """As ``uniform``, for what a token is made from: 0 stands for the likeliest."""
        return self.uniform(where)

    def pick(self, where: Tensor) -> Tensor:
        """One-hot bool [B, L]: in each sequence one of the positions ``where``, uniformly; none if there is none."""
        distribution = (where / where.sum(-1, keepdim=True).clamp_min(1))[:, None]
        index = self.categorical(distribution, where.any(-1, keepdim=True))
        return torch.zeros_like(where).scatter(-1, index, True) & where

    def _numbers(self, where: Tensor) -> Tensor:
        """One number in [0, 1), float64, for each of the positions ``where`` [B, L] bool, in their order: [N]."""
        counts = where.sum(-1).tolist()
        drawn = [
            torch.rand(count, generator=generator, dtype=torch.float64)
            for count, generator in zip(counts, self.generators, strict=True)
        ]
        return to_device(torch.cat(drawn), where.device)


class LikeliestDraws(Draws):
    """Takes the likeliest token wherever one is drawn from a distribution; places and times are still drawn."""

    def rows(self, distribution: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(where.shape, dtype=torch.long, device=where.device).masked_scatter(
            where, distribution.argmax(-1)
        )

    def numbers(self, where: Tensor) -> Tensor:
        return torch.zeros(where.shape, dtype=torch.float64, device=where.device)

    def pick(self, where: Tensor) -> Tensor:
        return Draws(self.generators).pick(where)


class BatchDraws(Draws):
    """All numbers at once from one generator, on the CPU: for training, where batches need not equal single runs."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, where: Tensor) -> Tensor:
        values = torch.rand(where.shape, generator=self.generator, dtype=torch.float64).to(where.device)
        return torch.where(where, values, 0)

    def rows(self, distribution: Tensor, where: Tensor) -> Tensor:
        cumulative = distribution.double().cumsum(-1)
        threshold = self.uniform(where)[where][:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(distribution.shape[-1] - 1)
        return torch.zeros(where.shape, dtype=torch.long, device=where.device).masked_scatter(where, drawn)
