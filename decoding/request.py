"""What was asked of ``generate``: checks of its settings, and the sequences that stand for its prompts."""

import functools
import warnings

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel

from decoding.batch import Sequence
from decoding.forward.cache import SlotCache
from decoding.forward.rope import check_reach, context_length

# Settings of GenerationConfig that ask for something a decoder does not do, with the value that does not ask.
REFUSED = {
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "speculation_type": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "guidance_scale": None,
    "watermarking_config": None,
    "token_healing": False,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "compile_config": None,
}
# What `generate` prepares for its own loops; the engine makes its own positions and asks for its own logits.
PREPARED = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "synced_gpus",
    "tokenizer",
}


def keep_arguments_for(kind: type) -> None:
    """Let ``generate`` hand a ``custom_generate`` of ``kind`` all arguments; other calls go through untouched.

    transformers drops ``streamer``, ``tokenizer``, ``assistant_model`` and the like before it calls a callable: stop strings
    would fail for want of a tokenizer, and a streamer would stay silent. This wraps the one method that drops them.
    """
    original = GenerationMixin._extract_generation_mode_kwargs

    @functools.wraps(original)
    def extract(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        """Pass on to ``kind`` everything that the original would collect for ``generate``'s own loops."""
        if isinstance(custom_generate, type) and issubclass(custom_generate, kind):
            name = custom_generate.__name__
            raise ValueError(f"custom_generate must be a decoder such as {name}(), got the class {name}")
        if not isinstance(custom_generate, kind):
            return original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        given = kwargs.get("past_key_values")
        if isinstance(given, Cache) and not isinstance(given, SlotCache):
            raise ValueError(
                f"{type(custom_generate).__name__} cannot use past_key_values of type {type(given).__name__}, which would "
                f"stay as it is; pass decoding.SlotCache to keep a cache"
            )
        own = original(self, custom_generate, dict(kwargs), synced_gpus, assistant_model, streamer)
        standard = original(self, None, kwargs, synced_gpus, assistant_model, streamer)
        for name in own:
            kwargs.pop(name, None)
        return standard | own

    GenerationMixin._extract_generation_mode_kwargs = extract  # type: ignore[method-assign]


def check_request(
    name: str, config: GenerationConfig, prepared: dict, output_logprobs: bool, gives_logprobs: bool
) -> None:
    """Raise ValueError for a setting that no decoder, or not the one called ``name``, can honour."""
    for field, neutral in REFUSED.items():
        value = getattr(config, field, neutral)
        if value not in (neutral, None):
            raise ValueError(f"{name} does not support {field}={value!r}; leave it at {neutral!r}")
    for field, value in prepared.items():
        if field not in PREPARED and value is not None:
            shown = repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
            raise ValueError(f"{name} cannot use the argument {field} ({shown})")
    if prepared.get("synced_gpus"):
        raise ValueError(f"{name} does not support synced_gpus=True; gather the parameters before generating")
    if output_logprobs and not gives_logprobs:
        raise ValueError(
            f"{name} does not compute next-token distributions, so output_logprobs=True cannot be honoured"
        )


def check_positions(position_ids: Tensor | None, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise ValueError for positions [B, P] other than 0, 1, 2, ... from each prompt's first token, which rows always have."""
    if position_ids is None:
        return
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    own = mask.cumsum(-1) - 1
    if position_ids.shape[-1] != own.shape[-1] or bool(((position_ids != own) & mask.bool()).any()):
        raise ValueError("position_ids: decoders count positions from the first token of each prompt; leave them out")


def check_padding(attention_mask: Tensor | None) -> None:
    """Raise ValueError for a mask [B, P] that hides the end of a prompt.

    ``generate`` warns of it and continues from the padding, which is no text of the model.
    """
    if attention_mask is None:
        return
    padded = attention_mask.bool().any(-1) & ~attention_mask[:, -1].bool()  # an empty prompt has a sentence of its own
    if bool(padded.any()):
        index = int(padded.nonzero()[0])
        raise ValueError(
            f"attention_mask: prompt {index} is padded on the right, but its last token must be the last of its row; "
            f"load the tokenizer with padding_side='left'"
        )


def check_block_size(block_size: int | None, config: PretrainedConfig) -> None:
    """Raise ValueError for blocks that are longer than any text of the model."""
    context = context_length(config)
    if block_size is not None and context is not None and block_size > context:
        raise ValueError(f"block_size must be from 1 to {context}, the context of the model, got {block_size}")


def make_sequences(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    limit: int,
    ahead: int = 0,
    particles: int = 1,
) -> list[Sequence]:
    """One Sequence for each row of ``input_ids`` [B, P], padding removed; ``limit`` counts the padding, as HF does.

    ``ahead``: how many positions behind the text the decoder's rows may stand. ``particles``: rows for each prompt.
    """
    context = context_length(model.config)
    seed = int(torch.randint(2**62, ()))  # follows torch.manual_seed
    sequences, longest = [], 0
    for index, row in enumerate(input_ids):
        real = torch.ones_like(row, dtype=torch.bool) if attention_mask is None else attention_mask[index].bool()
        tokens, padding = row[real].tolist(), row[~real].tolist()
        prompt = f"prompt {index // particles}"
        if not tokens:
            raise ValueError(f"{prompt} is empty: give at least one token, for instance the BOS token")
        if context is not None and len(tokens) >= context:
            raise ValueError(
                f"{prompt} has {len(tokens)} tokens, but the model's context (max_position_embeddings) is {context}; it must "
                f"be shorter"
            )
        longest = max(longest, limit - len(padding))
        check_reach(model, limit - len(padding) - 1 + ahead)
        generator = torch.Generator().manual_seed(seed + index)
        sequences.append(Sequence(index, tokens, limit - len(padding), generator, padding))
    if context is not None and longest > context:
        warnings.warn(
            f"this run may reach {longest} tokens, more than the model's context of {context}; what comes behind that is no "
            f"text of the model",
            stacklevel=4,
        )
    return sequences


def kept_cache(cache: Cache | None, batch_size: int, num_layers: int) -> SlotCache | None:
    """The cache to go on with, if the user passed one of ours; the empty one that ``generate`` makes is left unused."""
    if not isinstance(cache, SlotCache):
        return None
    if batch_size > 1 or len(cache.tokens) > 1:
        raise ValueError(
            f"past_key_values: a SlotCache is kept for one sequence at a time, got a batch of {batch_size}"
        )
    if len(cache.layers) != num_layers:
        raise ValueError(f"past_key_values: a SlotCache of {len(cache.layers)} layers, but the model has {num_layers}")
    return cache


def pad_token(config: GenerationConfig) -> int:
    """The id that fills rows behind their end, as ``generate`` chooses it."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = config.eos_token_id
    return 0 if eos is None else eos if isinstance(eos, int) else eos[0]
