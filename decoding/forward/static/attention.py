"""Attention of few rows over many keys, without a copy of keys and values for every query head.

The query heads that share a head of keys stand as further rows of it: [B, H, R, D] becomes [B, H_kv, G R, D], so that
keys are read once and where they lie. No tensor is larger than a tile of rows by the keys it may see.
Shapes: B sequences, R rows, K slots, H query heads, H_kv heads of keys, G = H / H_kv, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from decoding.forward.visibility import Visibility

TILE = 64  # rows; with them the keys that none of a tile sees are left out


@dataclass(frozen=True)
class Tile:
    """Rows ``start`` .. ``end`` - 1 of a forward, the slots 0 .. ``num_slots`` - 1 that some of them see, and which.

    ``bias`` is what is added to the scores, 0 or minus infinity: [B, 1, rows, num_slots], or with the rows of all heads of
    a group [B, 1, G rows, num_slots]; None where all rows see all of these slots.
    """

    start: int
    end: int
    num_slots: int
    bias: Tensor | None


def make_tiles(
    visibility: Visibility, num_slots: int, tile_slots: Sequence[int], dtype: torch.dtype, groups: int, sees_all: bool
) -> list[Tile]:
    """Tiles of all rows. ``tile_slots``: for each the number of slots from the first on that its rows may see.

    sees_all: whether every row sees every slot, so that nothing need be hidden.
    """
    rows = visibility.prefix_end.shape[1]
    starts = range(0, rows, TILE)
    tiles = []
    for start, slots in zip(starts, tile_slots, strict=True):
        end = min(start + TILE, rows)
        bias = None
        if not sees_all:
            visible = visibility.of_rows(slice(start, end)).as_bool(slots)
            bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            if len(starts) == 1:  # small enough to be kept for all layers
                bias = of_groups(bias, groups)
        tiles.append(Tile(start, end, slots, bias))
    return tiles


def of_groups(bias: Tensor, groups: int) -> Tensor:
    """[B, 1, R, K] repeated for the rows of each head of a group: [B, 1, G R, K]."""
    batch, _, rows, slots = bias.shape
    return bias.expand(batch, groups, rows, slots).reshape(batch, 1, groups * rows, slots)


def grouped_attention(query: Tensor, keys: Tensor, values: Tensor, tiles: list[Tile], scale: float) -> Tensor:
    """[B, R, H D] of ``query`` [B, R, H, D] over ``keys`` and ``values`` [B, H_kv, S, D]; ``tiles`` say what rows see."""
    if len(tiles) == 1:
        return _attend(query, keys, values, tiles[0], scale)
    outputs = [_attend(query[:, tile.start : tile.end], keys, values, tile, scale) for tile in tiles]
    return torch.cat(outputs, dim=1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, tile: Tile, scale: float) -> Tensor:
    batch, rows, heads, width = query.shape
    shared = keys.shape[1]
    groups = heads // shared
    folded = query.view(batch, rows, shared, groups, width).permute(0, 2, 3, 1, 4)
    bias = tile.bias
    if bias is not None and bias.shape[2] != groups * rows:
        bias = of_groups(bias, groups)
    output = scaled_dot_product_attention(
        folded.reshape(batch, shared, groups * rows, width),
        keys[:, :, : tile.num_slots],
        values[:, :, : tile.num_slots],
        bias,
        scale=scale,
    )
    unfolded = output.view(batch, shared, groups, rows, width).permute(0, 3, 1, 2, 4)
    return unfolded.reshape(batch, rows, heads * width)
