"""How many rows a request needs behind its text: the plan of the scheduler, and how the worker reads it again.

The rows of a request in one forward are, in this order,

    [ text that has no keys and values yet | drafts, causal | masks, which see all of the request's rows ]

and the scheduler tells the worker only two numbers: how many rows there are, and how many of them stand behind the text.
All plans are such that the worker can tell drafts from masks by these. This module knows no vLLM.
"""

from dataclasses import dataclass

import numpy as np

from serving.options import DecoderOptions


@dataclass(frozen=True)
class Canvas:
    """Rows behind the text: drafts that are verified, then masks."""

    drafts: int = 0
    masks: int = 0

    @property
    def size(self) -> int:
        return self.drafts + self.masks


@dataclass
class Progress:
    """What the scheduler knows of a request between forwards.

    held: drafts that wait on the device to be verified. open_masks: positions of the open block, 0 if none is open.
    """

    options: DecoderOptions
    held: int = 0
    open_masks: int = 0

    def plan(self, room: int, reach: int) -> Canvas:
        """The next canvas. room: tokens that may still be emitted; reach: positions of the context behind the text."""
        size = self.options.block_size
        if self.options.kind == "ntp":
            return Canvas()
        if self.options.kind == "sbd":
            return Canvas(masks=min(self.open_masks or size, reach))
        drafts = max(0, min(self.held, room - 1, reach))
        # With less room nothing is left to draft behind all drafts and the token after them.
        worth = room - (drafts + 1) >= 2 and drafts + size <= reach
        return Canvas(drafts, size if worth else 0)

    def advance(self, ran: Canvas, emitted: int) -> None:
        """Take note that ``ran`` emitted so many tokens."""
        if self.options.kind == "sbd-lossless":
            # Only where every draft was accepted do the masks behind them stand in the right place.
            self.held = self.options.most_drafts if ran.masks and emitted == ran.drafts + 1 else 0
        elif self.options.kind == "sbd" and ran.masks:
            self.open_masks = ran.masks - emitted

    def restart(self) -> None:
        """The request lost its keys and values, and with them its canvas."""
        self.held = self.open_masks = 0


def split_canvas(sizes: np.ndarray, is_lossless: np.ndarray, block_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drafts and masks, both [B], of canvases of these ``sizes`` [B]; the inverse of what :meth:`Progress.plan` gives.

    A lossless canvas has either a whole block of masks or none, and less drafts than a block.

    >>> drafts, masks = split_canvas(np.array([7, 3, 4, 0]), np.array([True] * 4), np.array([4] * 4))
    >>> drafts.tolist(), masks.tolist()
    ([3, 3, 0, 0], [4, 0, 4, 0])
    """
    masks = np.where(is_lossless, np.where(sizes >= block_sizes, block_sizes, 0), sizes)
    return sizes - masks, masks
