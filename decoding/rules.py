"""Reveal rules: which masked tokens of a block to decide together. Pure functions of tensors.

Shapes: B sequences, Q rows of a block. A rule is called as ``rule(scores, masked, first) -> reveal``, all [B, Q];
``reveal`` lies within ``masked`` and holds at least one token of every sequence that has any. Rows in ``first`` are
revealed in any case and count before all others.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice, check_count, check_range

Order = Literal["entropy", "confidence", "margin"]
ORDERS = ("entropy", "confidence", "margin")


@dataclass(frozen=True)
class RowScores:
    """What rules look at, all [..., Q] float32: entropy in nats, largest probability, and its lead over the second."""

    entropy: Tensor
    confidence: Tensor
    margin: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "RowScores":
        """Scores of rows of logits [..., Q, V].

        >>> RowScores.of(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])).entropy.tolist()
        [0.6931471824645996, 0.0]
        """
        log_p = logits.float().log_softmax(-1)
        p = log_p.exp()
        entropy = torch.where(p > 0, -p * log_p, 0).sum(-1)
        top = p.topk(min(2, p.shape[-1]), dim=-1).values
        return cls(entropy.clamp_min(0), top[..., 0], top[..., 0] - top[..., -1])

    def cost(self, order: Order) -> Tensor:
        """The error proxy of an order: small is revealed early."""
        return {"entropy": self.entropy, "confidence": -self.confidence, "margin": -self.margin}[order]


class RevealRule(ABC):
    """Base of all rules, which are frozen dataclasses of their settings."""

    @abstractmethod
    def __call__(self, scores: RowScores, masked: Tensor, first: Tensor | None = None) -> Tensor:
        """Which masked rows to reveal, [B, Q] bool; ``masked`` and ``first`` are [B, Q] bool, too."""


@dataclass(frozen=True)
class EntropyBound(RevealRule):
    """Reveal the longest prefix, in ``order``, with sum(H) - max(H) <= entropy_bound (in nats).

    Source: EB-Sampler, arXiv 2505.24857; Set Block Decoding, arXiv 2509.04185, equations 8 and 18. The left side bounds
    the dependence between the tokens revealed together. 0 reveals one token per forward (more only where entropies
    are exactly 0 in floating point, which ``max_reveal=1`` excludes), infinity the whole block.

    Beside a row in ``first``, whose distribution is exact, the bound is on the sum(H) of all others: by the chain
    rule this bounds the dependence as well, and no guess is free. (Else one dear guess would ride along with every
    certain exact token.)
    """

    entropy_bound: float = 0.1
    order: Order = "entropy"
    max_reveal: int | None = None

    def __post_init__(self) -> None:
        check_range("entropy_bound", self.entropy_bound, 0)
        check_choice("order", self.order, ORDERS)
        _check_max_reveal(self.max_reveal)

    def __call__(self, scores: RowScores, masked: Tensor, first: Tensor | None = None) -> Tensor:
        order = _ranking(scores.cost(self.order), masked, first)
        entropy = scores.entropy.gather(-1, order)
        # sum(H) - max(H), summed without a difference: each new row adds the smaller of its own and the largest so far.
        largest = torch.nn.functional.pad(entropy.cummax(-1).values[..., :-1], (1, 0))
        charged = torch.minimum(entropy, largest)
        if first is not None:
            exact = first.gather(-1, order)
            charged = torch.where(exact.any(-1, keepdim=True), entropy.masked_fill(exact, 0), charged)
        accept = charged.cumsum(-1) <= self.entropy_bound
        # The left side does not fall, so the accepted rows are a prefix; rounding must not make it less than one.
        return _reveal(accept, order, masked, first, self.max_reveal)


@dataclass(frozen=True)
class ConfidenceThreshold(RevealRule):
    """Reveal every token whose distribution has a probability above ``confidence_threshold`` (Fast-dLLM, arXiv 2505.22618)."""

    confidence_threshold: float = 0.9
    max_reveal: int | None = None

    def __post_init__(self) -> None:
        check_range("confidence_threshold", self.confidence_threshold, 0, 1)
        _check_max_reveal(self.max_reveal)

    def __call__(self, scores: RowScores, masked: Tensor, first: Tensor | None = None) -> Tensor:
        order = _ranking(-scores.confidence, masked, first)
        accept = scores.confidence.gather(-1, order) > self.confidence_threshold
        return _reveal(accept, order, masked, first, self.max_reveal)


@dataclass(frozen=True)
class ConfidenceFactor(RevealRule):
    """Reveal the n most confident tokens, n the largest with (n + 1) (1 - c_n) < confidence_factor.

    c_n is the n-th largest confidence. Source: Fast-dLLM, arXiv 2505.22618.
    """

    confidence_factor: float = 1.0
    max_reveal: int | None = None

    def __post_init__(self) -> None:
        check_range("confidence_factor", self.confidence_factor, 0)
        _check_max_reveal(self.max_reveal)

    def __call__(self, scores: RowScores, masked: Tensor, first: Tensor | None = None) -> Tensor:
        order = _ranking(-scores.confidence, masked, first)
        confidence = scores.confidence.gather(-1, order)
        n = torch.arange(1, masked.shape[-1] + 1, device=masked.device)
        fits = ((n + 1) * (1 - confidence) < self.confidence_factor) & masked.gather(-1, order)
        accept = fits.flip(-1).cummax(-1).values.flip(-1)
        return _reveal(accept, order, masked, first, self.max_reveal)


@dataclass(frozen=True)
class TopK(RevealRule):
    """Reveal the ``top_k`` best tokens of each forward, in ``order``."""

    top_k: int = 1
    order: Order = "confidence"

    def __post_init__(self) -> None:
        check_count("top_k", self.top_k)
        check_choice("order", self.order, ORDERS)

    def __call__(self, scores: RowScores, masked: Tensor, first: Tensor | None = None) -> Tensor:
        order = _ranking(scores.cost(self.order), masked, first)
        return _reveal(torch.ones_like(masked), order, masked, first, self.top_k)


def _check_max_reveal(value: int | None) -> None:
    if value is not None:
        check_count("max_reveal", value)


def _ranking(cost: Tensor, masked: Tensor, first: Tensor | None) -> Tensor:
    """Indices [B, Q] that sort rows: `first`, then masked by cost, then the rest; ties keep the left one first."""
    # A broken model's nan would rank behind the decided rows, and nothing would be revealed, forever.
    cost = cost.nan_to_num(nan=torch.finfo(cost.dtype).max).masked_fill(~masked, torch.inf)
    if first is not None:
        cost = cost.masked_fill(first, -torch.inf)
    return cost.sort(dim=-1, stable=True).indices


def _reveal(accept: Tensor, order: Tensor, masked: Tensor, first: Tensor | None, max_reveal: int | None) -> Tensor:
    """Bring `accept` from ranked to row order; the best-ranked row and those in `first` are always in it."""
    accept = accept.clone()
    accept[..., 0] = True
    if max_reveal is not None:
        accept[..., max_reveal:] = False
    reveal = torch.zeros_like(masked).scatter(-1, order, accept)
    if first is not None:
        reveal |= first
    return reveal & masked
