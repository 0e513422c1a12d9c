"""The forward of training in blocks: a clean causal copy of packed rows, and corrupted copies whose blocks see it.

Source: arXiv 2509.04185, figure 7. Shapes: B rows, L tokens of each, D width of the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from decoding.forward.attention import run_trunk
from decoding.forward.gating import marked_block_rows
from decoding.forward.noise_level import NONE, with_noise_level
from decoding.training.blocks import BlockGrid, set_block_visibility
from decoding.training.packed import Packing


def run_copies(
    model,
    clean: Tensor,
    corrupted: Sequence[Tensor],
    packing: Packing,
    grids: Sequence[BlockGrid],
    *,
    frozen_clean: bool = False,
    levels: Tensor | None = None,
) -> list[Tensor]:
    """Hidden states [B, L, D] of the ``clean`` tokens [B, L], and of each ``corrupted`` copy [B, L] of them.

    ``grids``: the blocks of each corrupted copy. A corrupted row sees the clean tokens before its block, and its block in
    its own copy. ``levels`` [B, L] are the
    noise levels of the corrupted copies, for models that take them; the clean copy has none.

    In one forward, or in two with the same result: then the corrupted rows find the keys of the clean copy in a cache,
    in the slots where one forward would have them. Two are needed for ``frozen_clean``, which runs the clean copy
    without gradient, and save time where the mask is dense, as clean rows have no use for the keys of corrupted ones.
    """
    length, count = clean.shape[1], len(corrupted)
    tokens = torch.cat([clean, *corrupted], dim=1)
    positions = packing.position.repeat(1, 1 + count)
    visibility = set_block_visibility(packing, grids)
    is_block = (torch.arange(tokens.shape[1], device=tokens.device) >= length).expand_as(tokens)
    if levels is not None:
        levels = torch.cat([torch.full_like(levels, NONE), levels.repeat(1, count)], dim=1)

    def run(start: int, stop: int, cache: Cache | None = None) -> Tensor:
        """Rows start .. stop, which see no slot from ``stop`` on."""
        rows = slice(start, stop)
        with marked_block_rows(is_block[:, rows] if stop > length else None):
            embeddings = with_noise_level(model, tokens[:, rows], None if levels is None else levels[:, rows])
            seen = visibility.of_rows(rows)
            return run_trunk(model, tokens[:, rows], positions[:, rows], seen, stop, cache, embeddings)

    if not frozen_clean and not _gains_by_two_forwards(model):
        return list(run(0, tokens.shape[1]).split(length, dim=1))
    cache = DynamicCache()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen_clean):
        hidden = run(0, length, cache)
    return [hidden, *run(length, tokens.shape[1], cache).split(length, dim=1)]


def _gains_by_two_forwards(model) -> bool:
    """Other attention skips hidden keys anyway, checkpointing has no caches, a trunk is compiled for one shape."""
    checkpointed = model.training and model.is_gradient_checkpointing
    compiled = model.get_decoder()._compiled_call_impl is not None
    return model.config._attn_implementation in ("sdpa", "eager") and not checkpointed and not compiled
