"""A stock transformers model as the engine sees it: rows in, hidden states out; and which models can be run so."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoding.forward.attention import LAYER_TYPES, MASK_FORMS, run_trunk
from decoding.forward.cache import SlotCache
from decoding.forward.gating import marked_block_rows, marked_offsets
from decoding.forward.noise_level import with_noise_level
from decoding.forward.rows import RowList, Rows

TESTED = ("llama", "qwen2", "qwen3", "mistral")


def autocast_of(model: PreTrainedModel) -> AbstractContextManager:
    """The autocast that accelerate put around the model's forward, anew; a context without effect where there is none.

    Decoders run the trunk and the head by themselves, which it does not reach.
    """
    found = _autocast_of(model)
    if found is None:
        return nullcontext()
    return torch.autocast(
        found.device, dtype=found.fast_dtype, enabled=found._enabled, cache_enabled=found._cache_enabled
    )


def _autocast_of(model: PreTrainedModel) -> torch.autocast | None:
    forward = vars(model).get("forward")
    forward = getattr(forward, "__func__", forward)
    while forward is not None:
        for cell in getattr(forward, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.autocast):
                return cell.cell_contents
        forward = getattr(forward, "__wrapped__", None)
    return None


@torch.no_grad()
def run_rows(model: PreTrainedModel, rows: Rows, cache: SlotCache, trunk: nn.Module | None = None) -> Tensor:
    """Hidden states [B, R, D] of one forward pass over ``rows``, whose keys and values go to their slots of ``cache``."""
    cache.plan(rows.slots, rows.num_slots)
    is_block = rows.is_block if rows.has_blocks else None  # without any, nothing gated by them need run
    with autocast_of(model), marked_block_rows(is_block), marked_offsets(rows.offset):
        embeddings = with_noise_level(model, rows.tokens, rows.level)
        return run_trunk(model, rows.tokens, rows.positions, rows.visibility, rows.num_slots, cache, embeddings, trunk)


def is_tested(model: PreTrainedModel) -> bool:
    """Whether the model is of a type that the tests cover, and its forward is transformers' own, without a hook around it."""
    return (
        model.config.model_type in TESTED
        and type(model).__module__.startswith("transformers.")
        and ("forward" not in vars(model) or _autocast_of(model) is not None)
        and not model._forward_hooks
        and not model._forward_pre_hooks
    )


def forward_identity(model: PreTrainedModel) -> tuple:
    """What tells one forward of the model from another; a verdict on the model holds as long as it is the same."""
    return id(vars(model).get("forward")), *model._forward_hooks, None, *model._forward_pre_hooks


def check_kind(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that is no decoder-only one with a cache of keys and values."""
    kind, reason = f"model_type={model.config.model_type!r}", None
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder, and decoders run decoder-only models"
    elif model._is_stateful:
        reason = (
            "its layers keep a recurrent state, which cannot be taken back; decoders need keys and values in a cache"
        )
    elif others := {*(getattr(model.config, "layer_types", None) or ())} - {*LAYER_TYPES}:
        reason = f"its layers are of type {min(others)!r}, decoders know {' and '.join(map(repr, LAYER_TYPES))}"
    if reason is not None:
        raise ValueError(f"{kind} cannot be decoded: {reason}")


def check_attention(model: PreTrainedModel) -> None:
    """Raise ValueError for an attention implementation that cannot take our masks."""
    form = model.config._attn_implementation
    if form not in MASK_FORMS:
        raise ValueError(
            f"attn_implementation={form!r} cannot take the masks of block decoding; load the model with "
            f"attn_implementation set to one of {', '.join(map(repr, MASK_FORMS))}"
        )


def check_runnable(model: PreTrainedModel) -> None:
    """Raise ValueError for a state of the model in which its trunk alone is not what ``generate`` would run."""
    if model.training and model.is_gradient_checkpointing:
        raise ValueError(
            "the model is in training mode with gradient checkpointing, which runs without a cache; call model.eval() first"
        )
    prepare: Any = getattr(model, "prepare_inputs_for_generation")  # noqa: B009 - the type of models lacks it
    is_replaced = "prepare_inputs_for_generation" in vars(model)  # by a wrapper; else by a class of somebody's own
    if is_replaced or not prepare.__module__.startswith("transformers."):
        adapter = getattr(getattr(prepare, "__self__", None), "active_peft_config", None)
        if adapter is None:
            raise ValueError(
                "prepare_inputs_for_generation of the model was replaced, and what it adds would be lost: decoders run the "
                "trunk by themselves"
            )
        if adapter.is_prompt_learning:
            raise ValueError(
                f"{adapter.peft_type.value} puts virtual tokens before the prompt, which decoders cannot run; LoRA can be run"
            )


def warn_quantised_activations(model: PreTrainedModel, decoder_name: str) -> None:
    """Warn if layers round their inputs together: the rows of a forward then depend on each other."""
    for name, module in model.named_modules():
        kind, weight = type(module), getattr(module, "weight", None)
        by_module = "quantized.dynamic" in kind.__module__ or kind.__name__ == "Linear8bitLt"  # torch's, bitsandbytes'
        by_weight = (
            type(weight).__name__ == "LinearActivationQuantizedTensor"
        )  # torchao's, and newer ones by what they hold
        by_weight |= getattr(weight, "act_quant_kwargs", None) is not None
        if by_module or by_weight:
            warnings.warn(
                f"{decoder_name}: layer {name!r} ({kind.__name__}) quantises activations, so rows round otherwise beside other "
                f"rows and the text may differ from that of model.generate; weight-only quantisation is exact",
                stacklevel=4,
            )
            return


def probe(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ValueError for a model that would be decoded wrongly, tried on a few tokens, which go in on ``device``.

    Its logits through our masks and cache must equal its own, and a hidden key must not change them.
    """
    kind = model.config.model_type
    try:
        passed = _passes(model, device)
    except Exception as error:
        raise ValueError(f"model_type={kind!r} cannot be decoded: {type(error).__name__}: {error}") from error
    if not passed:
        raise ValueError(
            f"model_type={kind!r} cannot be decoded: its logits through our masks and cache differ from its own, which "
            f"something around the model may have changed; tested types are {', '.join(TESTED)}"
        )


@torch.no_grad()
def _passes(model: PreTrainedModel, device: torch.device) -> bool:
    """True if a ragged batch, run in pieces through the engine, gives the model's own logits and obeys the masks."""
    tokens = [[(i + j) % model.config.vocab_size for j in range(1, count + 1)] for i, count in enumerate((12, 9))]
    own = [model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0].float() for text in tokens]
    reference = torch.cat(own)
    if not reference.isfinite().all():  # which is said when a token is to be chosen
        return True

    def chunked(scratch_token: int) -> Tensor:
        cache = SlotCache(model.config.num_hidden_layers, len(tokens))
        logits: list[list[Tensor]] = [[] for _ in tokens]
        for pieces in ([(0, 7), (0, 3)], [(7, 12), (3, 9)]):
            lists = [RowList() for _ in tokens]
            for rows, text, (start, end) in zip(lists, tokens, pieces, strict=True):
                rows.add_causal(text[start:end], start)
                rows.add_block([scratch_token] * 3, end, end)  # keys that the causal rows must not see
            packed = Rows.pack(lists, device)
            cache.plan(packed.slots, packed.num_slots)
            with autocast_of(model):
                hidden = run_trunk(model, packed.tokens, packed.positions, packed.visibility, packed.num_slots, cache)
                answers = model.get_output_embeddings()(hidden)
            for found, row, (start, end) in zip(logits, answers, pieces, strict=True):
                found.append(row[: end - start].float())
        return torch.cat([piece for found in logits for piece in found])

    exact = model.dtype == torch.float32 and _autocast_of(model) is None
    tolerance = 1e-3 if exact else 5e-2
    scale = reference.abs().max()
    first, second = chunked(1), chunked(2)
    # Experts and fused kernels may round otherwise beside other rows; a key that is seen changes far more than that.
    leak = (first - second).abs().max()
    return bool((first - reference).abs().max() <= tolerance * scale and leak <= tolerance / 10 * scale)
