"""A stock transformers model as the engine sees it: rows in, hidden states out; and which models can be run so."""

import warnings

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding.forward.attention import MASK_FORMS, run_trunk
from decoding.forward.cache import SlotCache
from decoding.forward.gating import marked_block_rows, marked_offsets
from decoding.forward.noise_level import with_noise_level
from decoding.forward.rows import RowList, Rows

TESTED = ("llama", "qwen2", "qwen3", "mistral")


@torch.no_grad()
def run_rows(model: PreTrainedModel, rows: Rows, cache: SlotCache) -> Tensor:
    """Hidden states [B, R, D] of one forward pass over ``rows``, whose keys and values go to their slots of ``cache``."""
    cache.plan(rows.slots, rows.num_slots)
    is_block = rows.is_block if rows.has_blocks else None  # without any, nothing gated by them need run
    with marked_block_rows(is_block), marked_offsets(rows.offset):
        embeddings = with_noise_level(model, rows.tokens, rows.level)
        return run_trunk(model, rows.tokens, rows.positions, rows.visibility, rows.num_slots, cache, embeddings)


def is_tested(model: PreTrainedModel) -> bool:
    """Whether the model is of a type that the tests cover."""
    return model.config.model_type in TESTED


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
    prepare = vars(model).get("prepare_inputs_for_generation")
    if prepare is not None:  # put there by a wrapper
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


def probe(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that would be decoded wrongly, tried on a few tokens.

    Its logits through our masks and cache must equal its own, and a hidden key must not change them.
    """
    kind = model.config.model_type
    try:
        passed = _passes(model)
    except Exception as error:
        raise ValueError(f"model_type={kind!r} cannot be decoded: {type(error).__name__}: {error}") from error
    if not passed:
        raise ValueError(
            f"model_type={kind!r} cannot be decoded: its logits through our masks and cache differ from its own; "
            f"tested types are {', '.join(TESTED)}"
        )


@torch.no_grad()
def _passes(model: PreTrainedModel) -> bool:
    """True if a chunked forward through the engine gives the model's own logits and obeys the masks."""
    count, split = 12, 7
    tokens = torch.arange(1, count + 1, device=model.device) % model.config.vocab_size
    reference = model(input_ids=tokens[None], use_cache=False).logits[0].float()

    def chunked(scratch_token: int) -> Tensor:
        cache = SlotCache(model.config.num_hidden_layers)
        logits = []
        for start, end in ((0, split), (split, count)):
            rows = RowList()
            rows.add_causal(tokens[start:end].tolist(), start)
            rows.add_block([scratch_token] * 3, end, end)  # keys that the causal rows must not see
            packed = Rows.pack([rows], model.device)
            cache.plan(packed.slots, packed.num_slots)
            hidden = run_trunk(model, packed.tokens, packed.positions, packed.visibility, packed.num_slots, cache)
            logits.append(model.get_output_embeddings()(hidden)[0, : end - start].float())
        return torch.cat(logits)

    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    scale = reference.abs().max()
    first, second = chunked(1), chunked(2)
    # Experts and fused kernels may round otherwise beside other rows; a key that is seen changes far more than that.
    leak = (first - second).abs().max()
    return bool((first - reference).abs().max() <= tolerance * scale and leak <= tolerance / 10 * scale)
