"""The main path: what a decoder is, and the one loop that runs it, from ``model.generate`` to its output."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from decoding.batch import Batch, RunError, Sequence, Stopping
from decoding.engine import Engine, Step
from decoding.forward.cache import SlotCache
from decoding.forward.mask_token import find_mask_token
from decoding.forward.model import check_kind
from decoding.forward.rows import RowList
from decoding.output import DecodeOutput, StreamWriter, assemble
from decoding.request import (
    check_block_size,
    check_padding,
    check_positions,
    check_request,
    keep_arguments_for,
    kept_cache,
    make_sequences,
    pad_token,
)
from decoding.sampling import LogitsPipeline

PREFILL_CHUNK = 512  # prompt tokens per forward; the last chunk rides with the first rows that decode


@dataclass(frozen=True)
class Resampling:
    """Sequences that became copies of others: number i is now what number ``ancestors[i]`` was.

    shared: how many tokens each had in common with what it has become, at least.
    """

    ancestors: list[int]
    shared: int


class Decoder(ABC):
    """Base of all decoders, which are frozen dataclasses: printable, comparable and hashable.

    A decoder is two functions around a forward pass: ``plan`` says which rows to run, ``absorb`` decides tokens from
    their logits. It holds settings only; everything that changes lives in the batch and its sequences. It is itself what
    ``model.generate`` takes as ``custom_generate``.
    """

    mask_token_id: int | None = None  # by default the one that the model's generation config names
    particles: int = 1  # sequences that are decoded for each prompt

    @property
    def needs_mask_token(self) -> bool:
        """Whether the model must have a mask token."""
        return False

    @property
    def gives_logprobs(self) -> bool:
        """Whether it computes the next-token distribution of what it emits, so that ``output_logprobs`` costs nothing."""
        return False

    @property
    def is_lossless(self) -> bool:
        """Whether what it samples has the model's next-token distribution, as ``generate`` processes it."""
        return False

    @property
    def can_fork(self) -> bool:
        """Whether a text can be copied, state and all, before it is finished."""
        return True

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

    def may_fork(self, sequence: Sequence) -> bool:
        """Whether it can be copied between this step and the next one, if ``can_fork``."""
        return True

    def fork(self, batch: Batch, sequence: Sequence, source: Sequence, engine: Engine) -> None:
        """Make the state of ``sequence``, which has become a copy of ``source`` in all else; it has its own generator."""
        sequence.state = copy.deepcopy(source.state)

    def resample(self, batch: Batch, engine: Engine) -> "Resampling | None":
        """Let sequences become copies of others between two steps; None if none did."""
        return None

    def settled(self, batch: Batch) -> list[int]:
        """New tokens of the first prompt that will not be taken back, for a streamer."""
        return batch.sequences[0].new_tokens

    def finish(self, batch: Batch, output: DecodeOutput) -> DecodeOutput:
        """The result of a run, of which ``output`` holds every sequence."""
        return output

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
    """Decode the prompts ``input_ids`` [B, P], padded on the left where ``attention_mask`` is 0; on the right is refused.

    Returns token ids [B, P + T], or a DecodeOutput with ``return_dict_in_generate=True``. Raises ValueError for anything
    that was asked and cannot be honoured, before the model is run.
    """
    model = engine.model
    stream = StreamWriter(streamer, len(input_ids))
    prompts, given = len(input_ids), (input_ids, attention_mask)
    if (particles := decoder.particles) > 1:
        if engine.keeps_whole_batch:
            raise ValueError(f"particles must be 1 with adapter_names, which name one for each prompt, got {particles}")
        input_ids = input_ids.repeat_interleave(particles, dim=0)
        attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(particles, dim=0)
    batch_size = len(input_ids)
    check_kind(model)
    check_request(type(decoder).__name__, generation_config, prepared, output_logprobs, decoder.gives_logprobs)
    mask_token_id = find_mask_token(model, decoder.mask_token_id) if decoder.needs_mask_token else None
    processors = logits_processor or LogitsProcessorList()
    pipeline = LogitsPipeline(
        processors, bool(generation_config.do_sample), mask_token_id, prompts, particles=particles
    )
    check_block_size(getattr(decoder, "block_size", None), model.config)
    decoder.check(model, pipeline)
    kept = kept_cache(past_key_values, batch_size, model.config.num_hidden_layers)
    engine.check()
    check_padding(given[1])
    check_positions(prepared.get("position_ids"), *given)
    limit = generation_config.max_length
    sequences = make_sequences(model, input_ids, attention_mask, limit, decoder.rows_ahead, particles)
    stopping = Stopping.from_generate(generation_config, stopping_criteria, input_ids.device, particles)
    batch = Batch(
        sequences,
        pipeline,
        stopping,
        mask_token_id,
        output_logprobs,
        model.config,
        pad_token(generation_config),
        particles,
        tokenizer=prepared.get("tokenizer"),
    )

    cache = engine.new_cache(batch_size) if kept is None else kept
    if kept is not None:  # the last token must be run again: its row decides the next one
        sequences[0].cached = kept.rewind(0, sequences[0].tokens[:-1])
    try:
        prefill_forwards = decode(engine, decoder, batch, cache, stream)
        output = decoder.finish(batch, assemble(input_ids, sequences, batch.pad_token_id, prefill_forwards, kept))
        assert output.sequences is not None
        assert output.new_tokens is not None
        stream.write(output.sequences[0, input_ids.shape[1] :][: int(output.new_tokens[0])].tolist())
    except RunError as error:
        error.output = decoder.finish(batch, assemble(input_ids, sequences, batch.pad_token_id, None))
        raise
    finally:
        stream.end()
    if kept is not None:
        commit_pending(engine, sequences[0], kept)
    if generation_config.return_dict_in_generate:
        return output
    return output.sequences


def decode(engine: Engine, decoder: Decoder, batch: Batch, cache: SlotCache, stream: StreamWriter | None = None) -> int:
    """Run ``batch`` to its end; returns the number of forwards that only filled the cache."""
    prefill_forwards = prefill(engine, batch, cache, decoder.particles) if decoder.prefills else 0
    decoder.begin(batch, engine)
    in_cache = batch.unfinished
    while unfinished := batch.unfinished:
        needed = [i for i, sequence in enumerate(in_cache) if sequence.holds_place]
        if len(needed) < len(in_cache) and not engine.keeps_whole_batch:
            # Finished sequences leave the batch, their keys and values with them.
            cache.reorder_cache(torch.tensor(needed))
            in_cache = [in_cache[i] for i in needed]
        step = engine.step(decoder.plan(batch), cache, unfinished, in_cache)
        for sequence in unfinished:
            sequence.forwards += 1
        decoder.absorb(batch, step)
        batch.stop_together()
        if (resampling := decoder.resample(batch, engine)) is not None:
            in_cache = follow(resampling, batch, cache, in_cache)
        if stream is not None:
            shown = not batch.sequences[0].finished
            stream.write(decoder.settled(batch), (lambda: decoder.preview(batch)) if shown else None)
    return prefill_forwards


def follow(resampling: Resampling, batch: Batch, cache: SlotCache, in_cache: list[Sequence]) -> list[Sequence]:
    """Let the keys and values of sequences be those of their ancestors; returns the sequences that ``cache`` then holds."""
    places = {sequence.index: place for place, sequence in enumerate(in_cache)}
    needed = [sequence for sequence in batch.sequences if sequence.holds_place]
    sources = [places[resampling.ancestors[sequence.index]] for sequence in needed]
    if len(needed) == len(in_cache) and all(a is b for a, b in zip(needed, in_cache, strict=True)):
        copies = {place: source for place, source in enumerate(sources) if place != source}
        if copies:
            cache.copy_sequences(copies, resampling.shared)
    else:
        cache.reorder_cache(torch.tensor(sources, dtype=torch.long))
    return needed


def prefill(engine: Engine, batch: Batch, cache: SlotCache, particles: int = 1) -> int:
    """Run all but the last chunk of every prompt; returns the number of forwards.

    With several ``particles`` for each prompt all but its last token is run, once, and copied.
    """
    leaders, forwards = batch.sequences[::particles], 0
    left = PREFILL_CHUNK if particles == 1 else 1
    while any(len(sequence.pending) > left for sequence in leaders):
        lists = [RowList() for _ in leaders]
        for sequence, rows in zip(leaders, lists, strict=True):
            if len(sequence.pending) > left:
                chunk = sequence.pending[:-1][:PREFILL_CHUNK]
                rows.add_causal(chunk, sequence.cached)
                sequence.cached += len(chunk)
        engine.step(lists, cache)
        forwards += 1
    if particles > 1:
        cache.reorder_cache(torch.arange(len(leaders)).repeat_interleave(particles))
        for sequence in batch.sequences:
            sequence.cached = leaders[sequence.index // particles].cached
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
