"""What a probability path is: the distribution of the noisy text X_t between the source (t = 0) and the data (t = 1)."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from dfm.draws import Draws
from dfm.paths.sources import Source


class Noised(NamedTuple):
    """X_t [B, L], and where it is noise: ``hidden`` [B, L] bool, what the network has to predict with a mask source."""

    tokens: Tensor
    hidden: Tensor


class Path(ABC):
    """A family of distributions p_t(x | x0, x1) for one position; ``source`` is the distribution of x0."""

    source: Source

    @abstractmethod
    def sample(self, x0: Tensor, x1: Tensor, t: Tensor, draws: Draws) -> Noised:
        """X_t given x0 and x1."""

    @abstractmethod
    def marginal(self, x1: Tensor, t: Tensor) -> Tensor:
        """p_t(x | x1) [B, L, V] in the dtype of ``t``, with x0 drawn from the source."""

    @abstractmethod
    def dmarginal(self, x1: Tensor, t: Tensor) -> Tensor:
        """d p_t(x | x1) / dt [B, L, V]."""


def per_position(t: Tensor) -> Tensor:
    """t [B] or [B, L] as [B, 1] or [B, L]; ValueError outside [0, 1]."""
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must be in [0, 1], got {t.min():g} to {t.max():g}")
    return t[:, None] if t.dim() == 1 else t


def delta(tokens: Tensor, vocab_size: int, like: Tensor) -> Tensor:
    """delta_x [..., V] in the dtype of ``like``."""
    zeros = torch.zeros(*tokens.shape, vocab_size, dtype=like.dtype, device=tokens.device)
    return zeros.scatter_(-1, tokens[..., None], 1)
