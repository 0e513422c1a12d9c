"""Sources: what the text x0 at time 0 is, before any of it is data (arXiv 2407.15595)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.inputs.checks import check_count
from dfm.draws import Draws


class Source(ABC):
    """The distribution of x0. ``mask_id`` is the id of the mask token if that is what the source consists of."""

    vocab_size: int
    mask_id: int | None = None

    @abstractmethod
    def probabilities(self, like: Tensor) -> Tensor:
        """The distribution p of one token of x0, [V], in the dtype and on the device of ``like``; the tokens are
        independent.
        """

    def sample(self, x1: Tensor, draws: Draws) -> Tensor:
        """x0 [B, L] for the data ``x1`` [B, L]."""
        return self.fill(x1, torch.ones_like(x1, dtype=torch.bool), draws)

    def fill(self, x: Tensor, free: Tensor, draws: Draws) -> Tensor:
        """The text ``x`` [B, L], its positions ``free`` [B, L] bool drawn from the source: where sampling starts."""
        distribution = self.probabilities(torch.empty(0, dtype=torch.float64, device=x.device))
        return torch.where(free, draws.unigram(distribution, free), x)


def check_mask(source: Source, wanted: bool) -> None:
    """Raise ValueError unless the source has a mask token, or has none."""
    if (source.mask_id is not None) != wanted:
        raise ValueError(f"source must have {'a' if wanted else 'no'} mask token here, got {source}")


@dataclass(frozen=True)
class MaskSource(Source):
    """Every position is the mask token: p = delta_m."""

    vocab_size: int
    mask_id: int

    def __post_init__(self):
        check_count("vocab_size", self.vocab_size)
        check_count("mask_id", self.mask_id, 0, self.vocab_size - 1)

    def probabilities(self, like: Tensor) -> Tensor:
        distribution = like.new_zeros(self.vocab_size)
        distribution[self.mask_id] = 1
        return distribution

    def fill(self, x: Tensor, free: Tensor, draws: Draws) -> Tensor:
        return torch.where(free, self.mask_id, x)


@dataclass(frozen=True)
class UniformSource(Source):
    """Every token is equally likely, but for the ids in ``excluded`` (special tokens), which never occur."""

    vocab_size: int
    excluded: tuple[int, ...] = ()

    def __post_init__(self):
        check_count("vocab_size", self.vocab_size)
        object.__setattr__(self, "excluded", tuple(self.excluded))
        for token in self.excluded:
            check_count("excluded", token, 0, self.vocab_size - 1)
        if len(set(self.excluded)) == self.vocab_size:
            raise ValueError(f"excluded must leave at least one of {self.vocab_size} ids, got {self.excluded}")

    def probabilities(self, like: Tensor) -> Tensor:
        distribution = like.new_ones(self.vocab_size)
        distribution[list(self.excluded)] = 0
        return distribution / distribution.sum()


@dataclass(frozen=True, eq=False)
class UnigramSource(Source):
    """Any distribution of one token, [V]; normalised here. ValueError for negative numbers or a sum of zero."""

    distribution: Tensor

    def __post_init__(self):
        if self.distribution.dim() != 1 or bool((self.distribution < 0).any()) or not self.distribution.sum() > 0:
            raise ValueError(
                f"distribution must be [V] numbers of at least 0 with a sum above 0, got {self.distribution}"
            )
        object.__setattr__(self, "distribution", self.distribution.double() / self.distribution.double().sum())

    @property
    def vocab_size(self) -> int:
        return len(self.distribution)

    def probabilities(self, like: Tensor) -> Tensor:
        return self.distribution.to(like)


@dataclass(frozen=True)
class CouplingSource(Source):
    """x0 drawn together with x1: ``coupling(x1, draws) -> x0``.

    It has no distribution of one token, so only what needs none works with it: the forward velocity and kernel, training.
    Sampling starts from the text as it is given, which must be an x0.
    """

    vocab_size: int
    coupling: Callable[[Tensor, Draws], Tensor]

    def probabilities(self, like: Tensor) -> Tensor:
        raise ValueError("source must have independent tokens here, got CouplingSource")

    def sample(self, x1: Tensor, draws: Draws) -> Tensor:
        return self.coupling(x1, draws)

    def fill(self, x: Tensor, free: Tensor, draws: Draws) -> Tensor:
        return x
