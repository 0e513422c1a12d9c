"""Behind ``model.generate(..., custom_generate=decoder)``: check what was asked, set up a batch, run it, report."""

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from decoding.batch import Batch, Sequence
from decoding.decoder import Decoder
from decoding.forward.cache import SlotCache
from decoding.forward.costs import measure_row_costs
from decoding.forward.mask_token import find_mask_token
from decoding.forward.model import EngineModel
from decoding.loop import commit_pending, decode
from decoding.output import DecodeOutput, assemble
from decoding.sampling import TokenLaw
from decoding.stopping import Stopping
from decoding.streaming import StreamWriter

# Settings of GenerationConfig that ask for something a decoder does not do, with the value that does not ask.
REFUSED = {
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "guidance_scale": None,
    "watermarking_config": None,
    "token_healing": False,
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


def generate(
    decoder: Decoder,
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    output_logprobs: bool = False,
    streamer=None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **prepared,
) -> Tensor | DecodeOutput:
    """Decode the prompts ``input_ids`` [B, P] (padded on the left where ``attention_mask`` is 0) with ``decoder``.

    Returns token ids [B, P + T], or a DecodeOutput with ``return_dict_in_generate=True``. Raises ValueError for anything
    that was asked and cannot be honoured, before the model is run.
    """
    check_request(decoder, generation_config, prepared, output_logprobs)
    mask_token_id = find_mask_token(model, decoder.mask_token_id) if decoder.needs_mask_token else None
    law = TokenLaw(
        logits_processor or LogitsProcessorList(), bool(generation_config.do_sample), mask_token_id, len(input_ids)
    )
    decoder.check(model, law)
    stream = StreamWriter(streamer, len(input_ids))
    cache = _own_cache(past_key_values, len(input_ids))
    engine = EngineModel(model, len(input_ids), cache)
    sequences = make_sequences(model, input_ids, attention_mask, generation_config.max_length)
    if cache is not None:
        # The last token must be run again: its law decides the next one.
        sequences[0].cached = cache.rewind(0, sequences[0].tokens[:-1])
    batch = Batch(
        sequences,
        law,
        Stopping.of(generation_config, stopping_criteria, input_ids.device),
        mask_token_id,
        output_logprobs,
        config=model.config,
    )
    if decoder.most_rows is not None:
        batch.row_costs = measure_row_costs(engine, len(sequences), decoder.most_rows)
    prefill_forwards = decode(engine, decoder, batch, stream)
    stream.end()
    if cache is not None:
        commit_pending(engine, sequences[0])
        cache.tokens[0] = sequences[0].tokens[: sequences[0].cached]
    output = assemble(input_ids, sequences, _pad_token(generation_config), prefill_forwards)
    return output if generation_config.return_dict_in_generate else output.sequences


def check_request(decoder: Decoder, config: GenerationConfig, prepared: dict, output_logprobs: bool) -> None:
    """Raise ValueError for a setting that no decoder, or not this one, can honour."""
    name = type(decoder).__name__
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
    if output_logprobs and not decoder.gives_logprobs:
        raise ValueError(f"{name} does not compute next-token laws, so output_logprobs=True cannot be honoured")


def make_sequences(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, limit: int
) -> list[Sequence]:
    """One Sequence for each row of ``input_ids`` [B, P], padding removed; ``limit`` counts the padding, as HF does."""
    context = getattr(model.config, "max_position_embeddings", None)
    seed = int(torch.randint(2**62, ()))  # follows torch.manual_seed
    sequences = []
    for index, row in enumerate(input_ids):
        real = torch.ones_like(row, dtype=torch.bool) if attention_mask is None else attention_mask[index].bool()
        tokens, padding = row[real].tolist(), row[~real].tolist()
        if not tokens:
            raise ValueError(f"prompt {index} is empty: give at least one token, for instance the BOS token")
        if context is not None and len(tokens) >= context:
            raise ValueError(
                f"prompt {index} has {len(tokens)} tokens, but the model's context (max_position_embeddings) is {context}; "
                f"it must be shorter"
            )
        generator = torch.Generator().manual_seed(seed + index)
        sequences.append(Sequence(index, tokens, limit - len(padding), generator, padding))
    return sequences


def _own_cache(cache: Cache | None, batch_size: int) -> SlotCache | None:
    """The cache if the user passed one of ours; the empty one that ``generate`` makes for its own loops is left unused."""
    if not isinstance(cache, SlotCache):
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "past_key_values holds tokens but is no SlotCache; pass decoding.SlotCache to keep a cache"
            )
        return None
    if batch_size > 1 or len(cache.tokens) > 1:
        raise ValueError(
            f"past_key_values: a SlotCache is kept for one sequence at a time, got a batch of {batch_size}"
        )
    return cache


def _pad_token(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return config.pad_token_id
    eos = config.eos_token_id
    return 0 if eos is None else eos if isinstance(eos, int) else eos[0]
