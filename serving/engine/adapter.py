"""Row-gated LoRA inside vLLM: low-rank terms on mask rows only, sharded as the layers are that they are added to.

A layer of vLLM asks its ``quant_method`` to multiply. A wrapper around that adds the terms before a row-parallel layer
sums over ranks, so a rank holds the part of each term that belongs to its part of the weights, and nothing is sent. Causal rows
keep the plain model's bits: where a row is no mask row, the plain result is chosen, not computed anew.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from decoding.forward.adapter import WEIGHTS_FILE, read_settings

# Layers of vLLM that hold several of a checkpoint's, and which.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def is_of_adapter(name: str) -> bool:
    """Whether a weight of this name is one of a gated adapter's file."""
    return name == "mask_embedding" or name.startswith("terms.")


def attach_adapter(model: Any, folder: str, mask_token_id: int, block_rows: Tensor) -> None:
    """Put the adapter in ``folder`` on ``model``; ``block_rows`` [tokens] bool are the rows it acts on.

    Raises ValueError if it does not fit the model.
    """
    settings = read_settings(folder)
    weights = load_file(Path(folder) / WEIGHTS_FILE)
    scale, terms = settings["alpha"] / settings["rank"], _by_layer(weights)
    for name, layer in model.model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in MERGED.get(last, (last,))]
        found = [terms.pop(part, None) for part in parts]
        if any(pair is not None for pair in found):
            layer.quant_method = GatedLinearMethod(layer, found, scale, block_rows)
    if terms and not any(isinstance(module, _missing_layer()) for module in model.model.modules()):
        raise ValueError(f"the adapter in {folder!r} does not fit this model: it has no layer {sorted(terms)[0]}")
    embedding = model.model.embed_tokens
    if isinstance(embedding, nn.Module) and hasattr(embedding, "weight"):
        like = next(embedding.parameters())
        vector = weights["mask_embedding"].to(device=like.device, dtype=like.dtype)
        embedding.register_forward_hook(_embeds_masks(mask_token_id, vector, block_rows))


class GatedLinearMethod(LinearMethodBase):
    """What ``layer`` had as its method, and the terms of this rank, which become buffers of the layer.

    terms: for each of the layer's parts (down [rank, in], up [out, rank]) or None.
    """

    def __init__(self, layer: Any, terms: list[tuple[Tensor, Tensor] | None], scale: float, block_rows: Tensor):
        self.plain = layer.quant_method
        like = next(layer.parameters())
        downs, ups = [], []
        for part, pair in enumerate(terms):
            if pair is None:
                raise ValueError("an adapter of a server has terms for all parts of a merged layer or for none")
            down, up = _shard(layer, part, *pair)
            downs.append(down)
            ups.append(scale * up.float())
        # One multiplication down for all parts, and one up: the ups stand on a diagonal.
        buffers = {"gated_down": torch.cat(downs), "gated_up": torch.block_diag(*ups)}
        for name, buffer in buffers.items():
            layer.register_buffer(name, buffer.to(device=like.device, dtype=like.dtype), persistent=False)
        layer.register_buffer("block_rows", block_rows, persistent=False)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the layer has its weights already")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.plain.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [N, in] to [N, out]."""
        output = self.plain.apply(layer, x, bias)
        added = output + linear(linear(x, layer.gated_down), layer.gated_up)
        return torch.where(layer.block_rows[: x.shape[0], None], added, output)


def _shard(layer: Any, part: int, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of a term: of its input where the layer splits that, of its output where it splits that."""
    rank, ranks = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
    if ranks == 1 or isinstance(layer, ReplicatedLinear):
        return down, up
    if isinstance(layer, RowParallelLinear):
        return down.chunk(ranks, dim=1)[rank], up
    if isinstance(layer, QKVParallelLinear) and part > 0:
        return down, up.chunk(ranks // layer.num_kv_head_replicas)[rank // layer.num_kv_head_replicas]
    assert isinstance(layer, ColumnParallelLinear | MergedColumnParallelLinear)
    return down, up.chunk(ranks)[rank]


def _by_layer(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The terms by the names that layers have in a checkpoint, without "model."."""
    names = {name.split(".")[1] for name in weights if name.startswith("terms.")}
    return {
        name.replace("-", "."): (weights[f"terms.{name}.down"], weights[f"terms.{name}.up"]) for name in sorted(names)
    }


def _embeds_masks(
    mask_token_id: int, vector: Tensor, block_rows: Tensor
) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        """The vector of a mask row that is still undecided; any other row keeps its embedding."""
        (tokens,) = arguments
        is_mask = block_rows[: tokens.shape[0]] & (tokens == mask_token_id)
        return torch.where(is_mask[:, None], vector, output)

    return hook


def _missing_layer() -> type:
    from vllm.model_executor.models.utils import PPMissingLayer

    return PPMissingLayer
