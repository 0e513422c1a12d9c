"""A reveal rule of one's own: as many tokens as are likelier than a line that falls with each one revealed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoding import RevealRule, RowScores
from decoding.inputs.checks import check_range


@dataclass(frozen=True)
class FallingLine(RevealRule):
    """Reveal the n-th most confident token while its confidence is above start + slope (n - 1)."""

    start: float = 0.9
    slope: float = 0.02

    def __post_init__(self):
        check_range("start", self.start, 0, 1)

    def __call__(self, scores: RowScores, masked: Tensor, first: Tensor | None = None) -> Tensor:
        confidence = scores.confidence.masked_fill(~masked, -1)
        if first is not None:
            confidence = confidence.masked_fill(first, 2)
        ranked, order = confidence.sort(dim=-1, descending=True, stable=True)
        line = self.start + self.slope * torch.arange(masked.shape[-1], device=masked.device)
        accept = (ranked > line).cummin(-1).values
        accept[..., 0] = True  # at least one token a forward
        return torch.zeros_like(masked).scatter(-1, order, accept) & masked
