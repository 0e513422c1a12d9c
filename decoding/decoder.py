"""The main path: what a decoder is, and the one loop that runs it, from ``model.generate`` to its output."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from decoding.batch import Batch, Sequence, Stopping, UndecidableToken
from decoding.engine import Engine, Step
from decoding.forward.cache import SlotCache
from decoding.forward.mask_token import find_mask_token
from decoding.forward.model import check_kind
from decoding.forward.rows import RowList
from decoding.output import DecodeOutput, StreamWriter, assemble
from decoding.request import (
    check_block_size,
    check_positions,
    check_request,
    keep_arguments_for,
    kept_cache,
    make_sequences,
    pad_token,
)
from decoding.sampling import LogitsPipeline

PREFILL_CHUNK = 512  # prompt tokens per forward; the last chunk rides with the first rows that decode


class Decoder(ABC):
    """Base of all decoders, which are frozen dataclasses: printable, comparable and hashable.

    A decoder is two functions around a forward pass: ``plan`` says which rows to run, ``absorb`` decides tokens from
    their logits. It holds settings only; everything that changes lives in the batch and its sequences. It is itself what
    ``model.generate`` takes as ``custom_generate``.
    """

    mask_token_id: int | None = None  # by default the one that the model's generation config names

    @property
    def needs_mask_token(self) -> bool:
        """Whether the model must have a mask token."""
        return False

    @property
    def gives_logprobs(self) -> bool:
        """Whether it computes the next-token distribution of what it emits, so that ``output_logprobs`` costs nothing."""
        return False

    @property
    def prefills(self) -> bool:
        """Whether the prompt is run causally, a long one in pieces before the first plan."""
        return True

    @property
    def rows_ahead(self) -> int:
        """How many positions behind the end of the text its rows may stand; by default two blocks, if it has blocks."""
        return 2 * (getattr(self, "block_size", None) or 0)

    def check(self, model: PreTrainedModel, pipeline: LogitsPipeline) -> None:
        """Raise ValueError, or warn, if the model or the settings of ``generate`` do not go with this decoder."""
        return

    def begin(self, batch: Batch, engine: Engine) -> None:
        """Set up what the decoder remembers during a run, in ``batch.state`` and the states of its sequences."""
        return

    @abstractmethod
    def plan(self, batch: Batch) -> list[RowList]:
        """The rows of the next forward: a RowList for each sequence of ``batch.unfinished``.

        Runs no model, and changes nothing but the states of the sequences, which keep the handles of the rows.
        """

    @abstractmethod
    def absorb(self, batch: Batch, step: Step) -> None:
        """Decide tokens from the logits of ``step`` and commit them. Runs no model beyond its head."""

    def preview(self, batch: Batch) -> list[int] | None:
        """Ids of the undecided end of the first sequence, the mask token where nothing is decided, for a live view."""
        return None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        engine: Engine | None = None,
        output_logprobs: bool = False,
        **prepared: Any,
    ) -> Tensor | DecodeOutput:
        """The form in which ``model.generate(..., custom_generate=decoder)`` calls us, everything prepared.

        The two arguments that are named here are our own, which is why ``generate`` passes them on: ``engine``, by default
        the one that is kept for the model, and ``output_logprobs``, to return the next-token log-probabilities of the
        new tokens.
        """
        engine = Engine.for_model(model) if engine is None else engine
        return generate(self, engine, input_ids, output_logprobs=output_logprobs, **prepared)


def generate(
    decoder: Decoder,
    engine: Engine,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    generation_config: GenerationConfig,
    output_logprobs: bool = False,
    streamer: BaseStreamer | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Cache | None = None,
    **prepared: Any,
) -> Tensor | DecodeOutput:
    """Decode the prompts ``input_ids`` [B, P], padded on the left where ``attention_mask`` is 0.

    Returns token ids [B, P + T], or a DecodeOutput with ``return_dict_in_generate=True``. Raises ValueError for anything
    that was asked and cannot be honoured, before the model is run.
    """
    model, batch_size = engine.model, len(input_ids)
    check_kind(model)
    check_request(type(decoder).__name__, generation_config, prepared, output_logprobs, decoder.gives_logprobs)
    mask_token_id = find_mask_token(model, decoder.mask_token_id) if decoder.needs_mask_token else None
    processors = logits_processor or LogitsProcessorList()
    pipeline = LogitsPipeline(processors, bool(generation_config.do_sample), mask_token_id, batch_size)
    check_block_size(getattr(decoder, "block_size", None), model.config)
    decoder.check(model, pipeline)
    stream = StreamWriter(streamer, batch_size)
    kept = kept_cache(past_key_values, batch_size, model.config.num_hidden_layers)
    engine.check()
    check_positions(prepared.get("position_ids"), input_ids, attention_mask)
    sequences = make_sequences(model, input_ids, attention_mask, generation_config.max_length, decoder.rows_ahead)
    stopping = Stopping.from_generate(generation_config, stopping_criteria, input_ids.device)
    batch = Batch(
        sequences, pipeline, stopping, mask_token_id, output_logprobs, model.config, pad_token(generation_config)
    )

    cache = engine.new_cache(batch_size) if kept is None else kept
    if kept is not None:  # the last token must be run again: its row decides the next one
        sequences[0].cached = kept.rewind(0, sequences[0].tokens[:-1])
    try:
        prefill_forwards = decode(engine, decoder, batch, cache, stream)
    except UndecidableToken as error:
        error.output = assemble(input_ids, sequences, batch.pad_token_id, None)
        raise
    finally:
        stream.end()
    if kept is not None:
        commit_pending(engine, sequences[0], kept)
    output = assemble(input_ids, sequences, batch.pad_token_id, prefill_forwards, kept)
    if generation_config.return_dict_in_generate:
        return output
    assert output.sequences is not None
    return output.sequences


def decode(engine: Engine, decoder: Decoder, batch: Batch, cache: SlotCache, stream: StreamWriter | None = None) -> int:
    """Run ``batch`` to its end; returns the number of forwards that only filled the cache."""
    prefill_forwards = prefill(engine, batch, cache) if decoder.prefills else 0
    decoder.begin(batch, engine)
    in_cache = batch.unfinished
    while unfinished := batch.unfinished:
        if len(unfinished) < len(in_cache) and not engine.keeps_whole_batch:
            # Finished sequences leave the batch, their keys and values with them.
            cache.reorder_cache(torch.tensor([i for i, sequence in enumerate(in_cache) if not sequence.finished]))
            in_cache = unfinished
        step = engine.step(decoder.plan(batch), cache, unfinished, in_cache)
        for sequence in unfinished:
            sequence.forwards += 1
        decoder.absorb(batch, step)
        batch.stop_together()
        if stream is not None:
            stream.write(batch, decoder.preview)
    return prefill_forwards


def prefill(engine: Engine, batch: Batch, cache: SlotCache) -> int:
    """Run all but the last chunk of every prompt; returns the number of forwards."""
    forwards = 0
    while any(len(sequence.pending) > PREFILL_CHUNK for sequence in batch.sequences):
        lists = [RowList() for _ in batch.sequences]
        for sequence, rows in zip(batch.sequences, lists, strict=True):
            if len(sequence.pending) > PREFILL_CHUNK:
                rows.add_causal(sequence.pending[:PREFILL_CHUNK], sequence.cached)
                sequence.cached += PREFILL_CHUNK
        engine.step(lists, cache)
        forwards += 1
    return forwards


def commit_pending(engine: Engine, sequence: Sequence, cache: SlotCache) -> None:
    """Leave ``cache`` as ``generate`` leaves one: with keys and values of all tokens but the last."""
    if len(sequence.pending) > 1:
        rows = RowList()
        rows.add_causal(sequence.pending[:-1], sequence.cached)
        engine.step([rows], cache)
        sequence.cached = len(sequence.tokens) - 1
    cache.tokens[0] = sequence.tokens[: sequence.cached]


# Here, so that it holds for every decoder, however it was imported.
keep_arguments_for(Decoder)
