"""The static trunk as compiled graphs: one for each batch size, padded number of rows and capacity of the cache.

What differs from forward to forward is in tensors: slots, the ends of the intervals that rows see, block rows. The mask is
built from them inside the graph, so nothing is compiled anew while a text grows within its capacity.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from decoding.forward.cache import SlotCache
from decoding.forward.rows import Rows
from decoding.forward.static.attention import Tile, make_tiles
from decoding.forward.static.trunk import Trunk
from decoding.forward.visibility import Visibility

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # what rows are padded to; more are not compiled
LEAST_CAPACITY = 256  # slots; capacities double from here
COMPILE_AFTER = 8  # forwards of a shape that run as they are before it is compiled, so that short texts never cause it
MODES: dict[bool | str, dict[str, Any]] = {True: {}, "cudagraphs": {"backend": "cudagraphs"}}


class CompiledTrunk:
    """Graphs of ``trunk``, made in the background: until one is there, and where none can be made, ``run`` gives None.

    windows: by kind of layer its sliding window, or None. mode: True or "cudagraphs".
    """

    def __init__(self, trunk: Trunk, windows: dict[str, int | None], mode: bool | str):
        self.trunk, self.windows = trunk, windows
        self._function: Callable[..., Tensor] = torch.compile(
            self._forward, dynamic=False, fullgraph=True, **MODES[mode]
        )
        self._seen: Counter[tuple] = Counter()
        self._ready: set[tuple] = set()
        self._failed = False

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor, rows: Rows, cache: SlotCache) -> Tensor | None:
        """Hidden states [B, R, D], as :class:`Trunk` gives them; None if this shape has no graph, or not yet."""
        batch, count, _ = hidden.shape
        if self._failed or count > ROWS[-1] or cache.allocated == 0:
            return None
        width = next(rows for rows in ROWS if rows >= count)
        shape = (batch, width, capacity(max(rows.num_slots + 1, cache.allocated)), rows.has_blocks)
        self._seen[shape] += 1
        if self._seen[shape] <= COMPILE_AFTER:
            return None
        if shape not in self._ready:
            if self._seen[shape] == COMPILE_AFTER + 1:
                cache.reserve(shape[2])
                in_background(lambda: self._compile(shape, hidden, cos, sin, rows, cache))
            return None
        cache.reserve(shape[2])
        return self._function(*self._inputs(shape, hidden, cos, sin, rows), *cache.buffers())[:, :count]

    def _inputs(self, shape: tuple, hidden: Tensor, cos: Tensor, sin: Tensor, rows: Rows) -> list[Any]:
        """Rows padded to the shape; padding sees only itself, in the last slot."""
        _, width, slots, has_blocks = shape
        missing = width - hidden.shape[1]
        written = rows.slots
        if isinstance(written, slice):
            written = torch.arange(written.start, written.stop, device=hidden.device)[None]
        seen = rows.visibility
        padded = [pad(x, (0, missing)) for x in (seen.prefix_end, seen.anchor)]
        padded += [pad(x, (0, missing), value=slots - 1) for x in (written, seen.own_start)]
        padded += [pad(seen.own_end, (0, missing), value=slots)]
        states = [pad(hidden, (0, 0, 0, missing)), *(pad(x, (0, 0, 0, 0, 0, missing)) for x in (cos, sin))]
        return [*states, *padded, pad(rows.is_block, (0, missing)) if has_blocks else None]

    def _forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        prefix_end: Tensor,
        anchor: Tensor,
        slots: Tensor,
        own_start: Tensor,
        own_end: Tensor,
        is_block: Tensor | None,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """What is compiled: a function of tensors alone."""
        seen = Visibility(None, prefix_end, own_start, own_end, anchor)
        groups, capacity = self.trunk.heads // self.trunk.shared_heads, keys[0].shape[2]
        tiles: dict[str, list[Tile]] = {}
        for kind, window in self.windows.items():
            visibility = seen.within_window(window)
            tiles[kind] = make_tiles(visibility, capacity, [capacity], hidden.dtype, groups, False)
        sequence = torch.arange(len(slots), device=slots.device)[:, None]

        def write(layer: int, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
            keys[layer].transpose(1, 2)[sequence, slots] = new_keys.transpose(1, 2)
            values[layer].transpose(1, 2)[sequence, slots] = new_values.transpose(1, 2)
            return keys[layer], values[layer]

        return self.trunk(hidden, cos, sin, tiles, write, is_block)

    def _compile(self, shape: tuple, hidden: Tensor, cos: Tensor, sin: Tensor, rows: Rows, cache: SlotCache) -> None:
        """Make the graph of ``shape`` by a run on tensors of its own."""
        try:
            with torch.no_grad():
                inputs = [
                    torch.zeros_like(x) if isinstance(x, Tensor) else x
                    for x in self._inputs(shape, hidden, cos, sin, rows)
                ]
                buffers = [[torch.zeros_like(buffer) for buffer in buffers] for buffers in cache.buffers()]
                inputs[3] = inputs[3] + 1  # every row sees slot 0
                self._function(*inputs, *buffers)
            self._ready.add(shape)
        except Exception as error:  # each backend has errors of its own
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"compile: {reason or type(error).__name__}; decoding goes on without it", stacklevel=2)


def capacity(slots: int) -> int:
    """The capacity that holds ``slots``.

    >>> capacity(200), capacity(257)
    (256, 512)
    """
    size = LEAST_CAPACITY
    while size < slots:
        size *= 2
    return size


def in_background(work: Callable[[], None]) -> None:
    """Do ``work`` in a thread of its own, which ends with the process."""
    threading.Thread(target=work, daemon=True).start()
