"""A roofline of decoding: seconds of a forward from bytes and arithmetic, and what decoders make of that.

A forward takes as long as the longer of two things: to read the weights and the keys and values of the context once, and to
multiply. Set Block Decoding (arXiv 2509.04185, section 4 and equation 16) does this with one wrong matrix; here the shapes
are those of the model: gated feed-forward layers, grouped heads, the head on the rows that are asked for.

All are bounds: launches, samplers and imperfect kernels come on top. Units: bytes, seconds, floating-point operations.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


@dataclass(frozen=True)
class DeviceFigures:
    """bandwidth: bytes per second read from memory; flops: of dense products at the dtype that is computed in."""

    bandwidth: float
    flops: float


# What their makers state for dense bf16.
DEVICES = {
    "h100": DeviceFigures(3.35e12, 989e12),
    "h200": DeviceFigures(4.8e12, 989e12),
    "b200": DeviceFigures(8.0e12, 2250e12),
}


@dataclass(frozen=True)
class ModelFigures:
    """Counts of one model: weights that a forward reads, weights of the head, sizes of attention."""

    trunk_weights: int
    head_weights: int
    layers: int
    heads: int
    shared_heads: int
    width: int

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "ModelFigures":
        """Of a Llama, Qwen2, Qwen3 or Mistral shape."""
        size, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or size // heads
        attention = 2 * size * heads * width + 2 * size * shared * width
        layer = attention + 3 * size * config.intermediate_size
        layers = config.num_hidden_layers
        return cls(layers * layer, size * config.vocab_size, layers, heads, shared, width)


def forward_seconds(
    model: ModelFigures,
    device: DeviceFigures,
    batch_size: int,
    context: int,
    rows: int,
    head_rows: int | None = None,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
) -> float:
    """Seconds of a forward of ``rows`` rows in each of ``batch_size`` sequences behind ``context`` tokens.

    head_rows: of a sequence, all of them by default. weight_bytes, cache_bytes: of one number; 1 for eight bits.

    >>> config = __import__("transformers").LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    ...     num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)
    >>> one = forward_seconds(ModelFigures.from_config(config), DEVICES["h200"], 1, 1024, 1)
    >>> round(1e3 * one, 2)
    3.15
    """
    all_rows, asked = batch_size * rows, batch_size * (rows if head_rows is None else head_rows)
    weights = model.trunk_weights + model.head_weights
    keys = context + rows
    cached = 2 * batch_size * keys * model.layers * model.shared_heads * model.width
    moved = weights * weight_bytes + cached * cache_bytes
    products = 2 * (all_rows * model.trunk_weights + asked * model.head_weights)
    attention = 4 * all_rows * keys * model.layers * model.heads * model.width
    return max(moved / device.bandwidth, (products + attention) / device.flops)


def estimate_decoding(
    model: ModelFigures,
    device: DeviceFigures,
    batch_sizes: Iterable[int],
    contexts: Iterable[int],
    block_sizes: Iterable[int],
    tokens_per_forward: float,
    weight_bytes: float = 2,
    cache_bytes: float = 2,
) -> Iterator[dict[str, Any]]:
    """Yield tokens per second, all sequences together: of ``ntp``, and of each decoder by block size.

    tokens_per_forward: recorded, per sequence; a block brings at most as many as it has. ``sbd`` runs k rows, and 2k in the
    first forward of a block (equation 16); ``alternate`` verifies and drafts in turns, 2k rows in a forward, and ``all``
    prepares a draft for each acceptance length, k + k^2 rows. ``best`` marks the fastest of each batch size and context.
    """
    blocks = sorted(set(block_sizes))
    for batch_size in batch_sizes:
        for context in contexts:

            def seconds(rows: float, head_rows: float, batch_size=batch_size, context=context) -> float:
                return forward_seconds(model, device, batch_size, context, rows, head_rows, weight_bytes, cache_bytes)

            found = [("ntp", 1, 1.0, seconds(1, 1))]
            for k in blocks:
                tokens = min(tokens_per_forward, k)
                forwards = k / tokens
                found.append(("sbd", k, tokens, (seconds(2 * k, k) + (forwards - 1) * seconds(k, k)) / forwards))
                found.append(("sbd-lossless, alternate", k, tokens, seconds(2 * k, k)))
                found.append(("sbd-lossless, all", k, tokens, seconds(k + k * k, 2 * k)))
                found.append(("prompt-lookup", k, tokens, seconds(k, k)))
            speeds = [batch_size * tokens / taken for _, _, tokens, taken in found]
            for (name, k, tokens, taken), speed in zip(found, speeds, strict=True):
                yield {
                    "decoder": name,
                    "batch_size": batch_size,
                    "context": context,
                    "block_size": k,
                    "tokens_per_forward": tokens,
                    "milliseconds": round(1e3 * taken, 3),
                    "tokens_per_second": round(speed, 1),
                    "speed_up": round(speed / speeds[0], 3),
                    "best": speed == max(speeds),
                }
