"""Acceptance along a block: drafts count only while all before them are accepted, which is what training should weigh.

Shapes: B rows, L tokens, N blocks of at most k tokens. The first mask of a block stands where verification puts a token of
its own, so the drafts of a block are its tokens 1 .. k - 1.
"""

from typing import Literal

import torch
from torch import Tensor

from decoding.training.blocks import BlockGrid

PositionWeights = Literal["uniform", "exponential", "dpace"]
POSITION_WEIGHTS = ("uniform", "exponential", "dpace")


class Chains:
    """The blocks of a grid as rows of a matrix [N, k], block by block from values of tokens [B, L] and back."""

    def __init__(self, blocks: BlockGrid):
        length = blocks.start.shape[1]
        index = torch.arange(length, device=blocks.start.device)
        self.shape, self.size = blocks.start.shape, blocks.size
        self.row, self.start = (blocks.start == index).nonzero(as_tuple=True)
        offsets = torch.arange(blocks.size, device=index.device)
        places = self.start[:, None] + offsets
        self.inside = places < blocks.end[self.row, self.start][:, None]  # [N, k] bool
        self.places = places.clamp_max(length - 1)

    def of(self, values: Tensor) -> Tensor:
        """[N, k] of ``values`` [B, L]; what is behind the end of a block means nothing."""
        return values[self.row[:, None], self.places]

    def back(self, values: Tensor) -> Tensor:
        """[B, L] of ``values`` [N, k]."""
        found = values.new_zeros(self.shape)
        row = self.row[:, None].expand_as(self.places)
        found[row[self.inside], self.places[self.inside]] = values[self.inside]
        return found


def exponential_weights(blocks: BlockGrid, gamma: float) -> Tensor:
    """exp(-(j - 1) / gamma) of draft j, [B, L]; 0 for the first mask of a block, which drafts nothing."""
    offset = torch.arange(blocks.start.shape[1], device=blocks.start.device) - blocks.start
    return torch.where(offset > 0, (-(offset - 1) / gamma).exp(), 0.0)


def dpace_weights(blocks: BlockGrid, alpha: Tensor) -> Tensor:
    """w_j = sum over m >= j of prod over i <= m of (alpha_i + 1) / 2, [B, L]: what draft j means for the accepted length.

    alpha: [B, L], the probability that a draft is accepted if those before it are, 1 for tokens that are no drafts.
    Source: D-PACE (arXiv 2605.18810).
    """
    chains = Chains(blocks)
    survives = torch.where(chains.inside, (chains.of(alpha) + 1) / 2, 0.0)
    survives[:, 0] = 1
    reached = survives.cumprod(-1)
    weights = reached.flip(-1).cumsum(-1).flip(-1)
    weights[:, 0] = 0
    return chains.back(weights)


def expected_tau(blocks: BlockGrid, alpha: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over blocks of 1 + sum over m of prod over 1 <= j <= m of alpha_j, and the number of these blocks.

    That is the tokens of a draft-verify cycle, tau, if the token that verification adds counts. Only blocks of full size
    whose tokens are all ``drafted`` [B, L] bool, but perhaps the first, are drafts as decoding has them.
    """
    chains = Chains(blocks)
    whole = (chains.inside & (chains.of(drafted) | (torch.arange(chains.size, device=alpha.device) == 0))).all(-1)
    reached = chains.of(alpha)[whole][:, 1:].cumprod(-1)
    return (1 + reached.sum(-1)).sum(), whole.sum()
