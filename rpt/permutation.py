"""Windows of neighbouring tokens in another order: the texts on which previous tokens are learned.

Source: arXiv 2506.06215. Slot j of a row holds token sigma_j and predicts token tau_j = sigma_{j+1}; its offset is
tau_j - sigma_j. Shapes: B rows, L tokens of each.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.training.packed import Packing
from rpt.config import ResampleConfig


@dataclass(frozen=True)
class Reordered:
    """A packed batch in another order, all [B, L]: slot j holds token ``sigma`` and predicts token ``tau``.

    ``has_target`` is False at the last slot of a document. ``offset`` is tau - sigma, 1 where there is no target.
    """

    sigma: Tensor
    tau: Tensor
    offset: Tensor
    has_target: Tensor


@dataclass(frozen=True)
class WindowPermuter:
    """Draws windows and reorders them as ``config`` says (its window w, sequence_share s, window_share q and perm).

    Walk left to right and start a window with probability q / (1 - q w) at every eligible position, then skip w + 1
    positions: away from borders the share of window starts is q, and an untouched token lies between two windows. A
    position is eligible if the whole window lies in one document, not at its start, and all its tokens are to be
    learned.
    """

    config: ResampleConfig

    def __call__(self, packing: Packing, loss_mask: Tensor, generator: torch.Generator | None = None) -> Reordered:
        """Reorder a batch; ``loss_mask`` [B, L] bool: the tokens to be learned. Draws from torch's by default."""
        sigma = packing.index.clone()
        for row, start in self._starts(packing, loss_mask, generator):
            order = self._order(generator)
            sigma[row, start : start + len(order)] = start + torch.tensor(order, device=sigma.device)
        return reordered(packing, sigma, self.config.prev_target)

    def _starts(self, packing: Packing, loss_mask: Tensor, generator) -> list[tuple[int, int]]:
        """(row, index of the first token) of every window."""
        w, q = self.config.window, self.config.window_share
        rate = q / (1 - q * w)
        eligible = (packing.position > 0) & (packing.index + w <= packing.end) & ~packing.is_padding
        for ahead in range(w):
            eligible &= loss_mask.roll(-ahead, dims=1)
        # Drawing every position and dropping what lies too near to a window is the same walk.
        chosen = torch.rand(eligible.shape, generator=generator) < rate
        permuted = torch.rand(len(eligible), 1, generator=generator) < self.config.sequence_share
        starts, last = [], (-1, 0)
        for row, index in (chosen & permuted & eligible.cpu()).nonzero().tolist():
            if row != last[0] or index > last[1] + w:
                last = (row, index)
                starts.append(last)
        return starts

    def _order(self, generator) -> list[int]:
        w = self.config.window
        if self.config.perm == "uniform":
            orders = list(itertools.permutations(range(w)))[1:]  # the first is the identity
            return list(orders[int(torch.randint(len(orders), (), generator=generator))])
        width = w
        if self.config.perm == "rotate_mixed":
            width = int(torch.randint(2, w + 1, (), generator=generator))
        return [*range(1, width), 0]


def reordered(packing: Packing, sigma: Tensor, prev_target: str = "follow") -> Reordered:
    """Targets and offsets of the order ``sigma`` [B, L].

    With ``prev_target`` "ntp" the row before a window keeps the next token of the plain text as its target.
    """
    has_target = packing.index + 1 < packing.end
    tau = torch.where(has_target, sigma.roll(-1, dims=1), sigma + 1)
    if prev_target == "ntp":
        in_place = sigma == packing.index
        tau = torch.where(in_place & _before_window(sigma, packing), sigma + 1, tau)
    return Reordered(sigma, tau, tau - sigma, has_target)


def _before_window(sigma: Tensor, packing: Packing) -> Tensor:
    """[B, L] bool: slots after which a window starts; until then every token has been in its place."""
    # A prefix of slots holds a prefix of the text exactly if its largest token is its last slot.
    closed = sigma.cummax(dim=1).values == packing.index
    moved = sigma != packing.index
    return closed & moved.roll(-1, dims=1)
