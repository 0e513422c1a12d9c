"""What leaves a run: tokens while they become final, and the result at its end."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from decoding.batch import Sequence


class StreamWriter:
    """Feeds a transformers streamer; without one it does nothing. Nothing that was put is ever taken back.

    ``put`` gets committed tokens [n] as they come; the prompt was already put by ``generate``. A streamer that has
    ``put_draft`` (as TextDiffusionStreamer) also gets the undecided rest of the block after each forward, the mask
    token where nothing is decided.
    """

    def __init__(self, streamer: BaseStreamer | None, batch_size: int):
        if streamer is not None and batch_size > 1:
            raise ValueError(f"streamer works with one sequence at a time, got a batch of {batch_size}")
        self.streamer = streamer
        self.written = 0

    def write(self, tokens: list[int], draft: Callable[[], list[int] | None] | None = None) -> None:
        """Put what of the final ``tokens`` was not put before, and then the ``draft`` of what is undecided, if there is one."""
        if self.streamer is None:
            return
        new_tokens = tokens[self.written :]
        if new_tokens:
            self.streamer.put(torch.tensor(new_tokens))
            self.written += len(new_tokens)
        if draft is not None and hasattr(self.streamer, "put_draft") and (undecided := draft()):
            self.streamer.put_draft(torch.tensor(undecided))

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


@dataclass
class DecodeOutput(ModelOutput):
    """Result of ``generate`` with ``return_dict_in_generate=True``. B sequences, T the most new tokens of any.

    sequences: [B, prompt + T] token ids, the prompt as given, finished rows filled with the pad token.
    forwards: [B] forward passes up to the first stop, the prefill not counted. The forward that runs the last piece of
        the prompt already decides tokens and is counted, so next-token decoding has exactly one token per forward.
    tokens_per_forward: [B] new tokens / forwards.
    prefill_forwards: forwards that only filled the cache.
    new_tokens: [B] number of new tokens, without padding.
    trace: for each sequence, the forward (1, 2, ...) that decided each new token.
    logprobs: [B, T] exact next-token log-probabilities in nats of the new tokens, at temperature 1 and before any
        processor; nan behind the end. A ResampleDecoder gives those of the distribution that each token was last
        drawn from, be it the next-token or the previous-token distribution. None unless asked for
        with ``output_logprobs=True``.
    acceptance_lengths: for each sequence, how many tokens of each verified draft were accepted; None where nothing drafts.
    revisions: for each sequence, how often each new token was replaced before it became final; None where nothing is.
    past_key_values: the SlotCache that was passed, with the keys and values of all tokens but the last.
    """

    sequences: Tensor | None = None
    forwards: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    prefill_forwards: int | None = None
    new_tokens: Tensor | None = None
    trace: tuple[list[int], ...] | None = None
    logprobs: Tensor | None = None
    acceptance_lengths: tuple[list[int], ...] | None = None
    revisions: tuple[list[int], ...] | None = None
    past_key_values: Cache | None = None


def assemble(
    prompt: Tensor,
    sequences: list[Sequence],
    pad_token_id: int,
    prefill_forwards: int | None,
    cache: Cache | None = None,
) -> DecodeOutput:
    """Put finished sequences, in the user's order, behind the padded prompt [B, P]."""
    counts = [len(sequence.new_tokens) for sequence in sequences]
    new = prompt.new_full((len(sequences), max(counts, default=0)), pad_token_id)
    for row, sequence in zip(new, sequences, strict=True):
        row[: len(sequence.new_tokens)] = torch.tensor(sequence.new_tokens, dtype=prompt.dtype, device=prompt.device)
    forwards = torch.tensor([sequence.forwards for sequence in sequences])
    logprobs = None
    if any(sequence.logprobs for sequence in sequences):
        logprobs = torch.full(new.shape, torch.nan)
        for row, sequence in zip(logprobs, sequences, strict=True):
            row[: len(sequence.logprobs)] = torch.tensor(sequence.logprobs)
    drafted = any(sequence.acceptance_lengths for sequence in sequences)
    revised = any(sequence.revisions for sequence in sequences)
    return DecodeOutput(
        sequences=torch.cat([prompt, new], dim=1),
        forwards=forwards,
        tokens_per_forward=torch.tensor(counts) / forwards.clamp_min(1),
        prefill_forwards=prefill_forwards,
        new_tokens=torch.tensor(counts),
        trace=tuple(sequence.decided_at for sequence in sequences),
        logprobs=logprobs,
        acceptance_lengths=tuple(sequence.acceptance_lengths for sequence in sequences) if drafted else None,
        revisions=tuple(sequence.revisions for sequence in sequences) if revised else None,
        past_key_values=cache,
    )
