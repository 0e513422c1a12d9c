"""The layers of Llama, Qwen2, Qwen3 and Mistral as one function of tensors, from the weights of a stock model.

What transformers computes, in fewer kernels: queries, keys and values in one product where weights are packed, rotary
positions of queries and keys together, attention by groups of heads (:mod:`decoding.forward.static.attention`). Nothing
in here reads a ContextVar or a value of a tensor, so it can be compiled as one graph.
Shapes: B sequences, R rows, D width of the model, H query heads and H_kv heads of keys, each W wide.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from decoding.forward.adapter import LowRank, gated_adapter
from decoding.forward.static.attention import Tile, grouped_attention
from decoding.forward.static.linear import Linear, linear_of

KNOWN = {
    LlamaModel: LlamaDecoderLayer,
    Qwen2Model: Qwen2DecoderLayer,
    Qwen3Model: Qwen3DecoderLayer,
    MistralModel: MistralDecoderLayer,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Writes keys and values [B, H_kv, R, W] of a layer and gives those of all its slots [B, H_kv, S, W].
Write = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Norm:
    """RMS norm over the last dimension."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class Terms:
    """The terms of a gated adapter for one group of linear layers with the same input: (term, first output, end)."""

    parts: list[tuple[LowRank, int, int]]

    def add(self, output: Tensor, x: Tensor, rows: Tensor) -> Tensor:
        """``output`` [B, R, N] of the layers for ``x``, the terms added on ``rows`` [B, R] bool."""
        for term, start, end in self.parts:
            output[..., start:end] = term(output[..., start:end], x, rows)
        return output


@dataclass(frozen=True)
class Layer:
    """The weights of one decoder layer. ``kind``: "full_attention" or "sliding_attention"."""

    kind: str
    norm_attention: Norm
    norm_mlp: Norm
    norm_query: Norm | None
    norm_key: Norm | None
    qkv: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    terms: dict[str, Terms]


@dataclass(frozen=True)
class Trunk:
    """All layers and the last norm; ``heads`` and ``shared_heads`` are H and H_kv, ``width`` W."""

    layers: list[Layer]
    norm: Norm
    heads: int
    shared_heads: int
    width: int

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        tiles: dict[str, list[Tile]],
        write: Write,
        is_block: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, R, D] behind the last norm.

        hidden: embeddings [B, R, D]. cos, sin: [B, R, W] of the rows' positions, the first half of ``sin`` negated
        (:func:`rotation`). tiles: by kind of layer. is_block: [B, R] bool, where the terms of a gated adapter act.
        """
        for index, layer in enumerate(self.layers):
            hidden = self._attention(index, layer, hidden, cos, sin, tiles[layer.kind], write, is_block)
            hidden = _mlp(layer, hidden, is_block)
        return self.norm(hidden)

    def same_as(self, other: "Trunk") -> bool:
        """Whether both hold the same tensors, not only equal ones."""
        return [*map(id, self._tensors())] == [*map(id, other._tensors())]

    def _tensors(self) -> Iterator[Any]:
        for layer in self.layers:
            for linear in (layer.qkv, layer.out, layer.gate, layer.up, layer.down):
                yield from (*linear.weights, *linear.biases)
            yield from (layer.norm_attention.weight, layer.norm_mlp.weight)
            for norm in (layer.norm_query, layer.norm_key):
                yield norm and norm.weight
            yield from (term for terms in layer.terms.values() for term, _, _ in terms.parts)

    def with_terms(self, terms: list[dict[str, Terms]]) -> "Trunk":
        """The same with other terms of an adapter, for each layer."""
        layers = [replace(layer, terms=own) for layer, own in zip(self.layers, terms, strict=True)]
        return replace(self, layers=layers)

    def _attention(self, index: int, layer: Layer, hidden, cos, sin, tiles, write: Write, is_block) -> Tensor:
        batch, rows, _ = hidden.shape
        x = layer.norm_attention(hidden)
        qkv = layer.qkv(x)
        if is_block is not None and "qkv" in layer.terms:
            qkv = layer.terms["qkv"].add(qkv, x, is_block)
        heads = qkv.view(batch, rows, self.heads + 2 * self.shared_heads, self.width)
        end = self.heads + self.shared_heads
        if layer.norm_query is not None and layer.norm_key is not None:
            query, key = layer.norm_query(heads[:, :, : self.heads]), layer.norm_key(heads[:, :, self.heads : end])
            turned = torch.cat([query, key], dim=2)
        else:
            turned = heads[:, :, :end]
        half = self.width // 2
        turned = torch.addcmul(turned * cos, torch.cat([turned[..., half:], turned[..., :half]], dim=-1), sin)
        key, value = turned[:, :, self.heads :], heads[:, :, end:]
        keys, values = write(index, key.transpose(1, 2), value.transpose(1, 2))
        seen = grouped_attention(turned[:, :, : self.heads], keys, values, tiles, self.width**-0.5)
        if is_block is None or "out" not in layer.terms:
            return layer.out.plus(seen, hidden)
        return hidden + layer.terms["out"].add(layer.out(seen), seen, is_block)


def _mlp(layer: Layer, hidden: Tensor, is_block: Tensor | None) -> Tensor:
    x = layer.norm_mlp(hidden)
    if is_block is None or not layer.terms:
        return layer.down.plus(layer.up.times(x, layer.gate.silu(x)), hidden)

    def output(name: str, linear: Linear, x: Tensor) -> Tensor:
        return layer.terms[name].add(linear(x), x, is_block) if name in layer.terms else linear(x)

    inner = silu(output("gate", layer.gate, x)) * output("up", layer.up, x)
    return hidden + output("down", layer.down, inner)


def rotation(model: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, R, 1, W] of ``positions`` [B, R], as the trunk takes them."""
    cos, sin = model.get_decoder().rotary_emb(hidden, position_ids=positions)
    half = sin.shape[-1] // 2
    return cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, :, None]


def why_not(model: Any) -> str | None:
    """Why the model's own modules must be run; None where :func:`make_trunk` does what they do."""
    if "forward" in vars(model):  # such as accelerate's, for its autocast
        return "forward of the model was replaced"
    decoder = model.get_decoder()
    layer_type = KNOWN.get(type(decoder))
    if layer_type is None:
        return f"model_type={model.config.model_type!r} has no static form"
    if model.dtype not in DTYPES:  # stock norms compute in float32 whatever the dtype
        return f"dtype={model.dtype}"
    if model.training:
        return "the model is in training mode"
    if model.config._attn_implementation != "sdpa":
        return f"attn_implementation={model.config._attn_implementation!r} was asked for"
    if model.config.hidden_act != "silu":
        return f"hidden_act={model.config.hidden_act!r}"
    adapter = gated_adapter(model)
    own = set() if adapter is None else {id(term) for term in adapter.terms.values()}
    for name, module in decoder.named_modules():
        if "forward" in vars(module):
            return f"forward of {name or 'the trunk'} was replaced"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if name != "embed_tokens" and not all(id(getattr(hook, "__self__", None)) in own for hook in hooks):
            return f"{name or 'the trunk'} has hooks"
    for layer in decoder.layers:
        if type(layer) is not layer_type or any(type(linear) is not nn.Linear for linear in _linears(layer).values()):
            return "layers were replaced"
        if any(len(linear.weight.shape) != 2 for linear in _linears(layer).values()):
            return "weights lie elsewhere"
    return None


def make_trunk(model: Any, linear: Callable[[list[nn.Linear]], Linear] = linear_of) -> Trunk:
    """The trunk of ``model``, of which :func:`why_not` says nothing, its products computed by ``linear``."""
    decoder, config = model.get_decoder(), model.config
    adapter = gated_adapter(model)
    every = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    kinds = getattr(config, "layer_types", None) or [every] * config.num_hidden_layers
    layers = []
    for index, layer in enumerate(decoder.layers[: config.num_hidden_layers]):
        attention, parts = layer.self_attn, _linears(layer)
        terms = {} if adapter is None else _terms(adapter, index, parts)
        has_norms = hasattr(attention, "q_norm")
        layers.append(
            Layer(
                kind=kinds[index],
                norm_attention=_norm(layer.input_layernorm),
                norm_mlp=_norm(layer.post_attention_layernorm),
                norm_query=_norm(attention.q_norm) if has_norms else None,
                norm_key=_norm(attention.k_norm) if has_norms else None,
                qkv=linear([parts["q_proj"], parts["k_proj"], parts["v_proj"]]),
                out=linear([parts["o_proj"]]),
                gate=linear([parts["gate_proj"]]),
                up=linear([parts["up_proj"]]),
                down=linear([parts["down_proj"]]),
                terms=terms,
            )
        )
    shared = config.num_key_value_heads
    return Trunk(layers, _norm(decoder.norm), config.num_attention_heads, shared, attention.head_dim)


def _linears(layer: Any) -> dict[str, nn.Linear]:
    attention, mlp = layer.self_attn, layer.mlp
    names = {name: attention for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    names |= {name: mlp for name in ("gate_proj", "up_proj", "down_proj")}
    return {name: getattr(module, name) for name, module in names.items()}


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _terms(adapter: Any, index: int, parts: dict[str, nn.Linear]) -> dict[str, Terms]:
    groups = {"qkv": ("q_proj", "k_proj", "v_proj"), "out": ("o_proj",)}
    groups |= {name: (f"{name}_proj",) for name in ("gate", "up", "down")}
    found = {}
    for group, names in groups.items():
        terms, start = [], 0
        for name in names:
            end = start + parts[name].out_features
            module = "self_attn" if group in ("qkv", "out") else "mlp"
            key = f"layers-{index}-{module}-{name}"
            if key in adapter.terms:
                terms.append((adapter.terms[key], start, end))
            start = end
        if terms:
            found[group] = Terms(terms)
    return found
