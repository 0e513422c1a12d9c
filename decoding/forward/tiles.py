"""Attention by tiles of rows that read only the keys that some of their rows may see: FlexAttention's saving, on a CPU.

PyTorch has no backward of FlexAttention for CPUs, and its sdpa computes every pair of a mask, seen or not. Half of a
causal mask is hidden, and three quarters of that of masked copies beside their text.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_tiles"
TILE = 64  # rows; small models gain most from small ones


def tiled_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings
) -> tuple[Tensor, None]:
    """What transformers' ``sdpa`` gives, [B, R, H, D], of ``query`` [B, H, R, D] and a mask [B, 1, R, K] of bool."""
    if attention_mask is None or query.shape[2] <= TILE:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    outputs = []
    for rows, mask in zip(query.split(TILE, dim=2), attention_mask.split(TILE, dim=2), strict=True):
        seen = mask.any(dim=(0, 1, 2)).nonzero()[:, 0]
        keys, values = key.index_select(2, seen), value.index_select(2, seen)
        outputs.append(sdpa_attention_forward(module, rows, keys, values, mask[..., seen], **settings)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, tiled_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
