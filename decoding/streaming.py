"""Streaming: only what is committed is put, and nothing that was put is ever taken back."""

import torch
from transformers.generation.streamers import BaseStreamer

from decoding.batch import Batch


class StreamWriter:
    """Feeds a transformers streamer; without one it does nothing.

    ``put`` gets committed tokens [n] as they come; the prompt was already put by ``generate``. A streamer that has
    ``put_draft`` (as TextDiffusionStreamer) also gets the undecided rest of the block after each forward, the mask
    token where nothing is decided.
    """

    def __init__(self, streamer: BaseStreamer | None, batch_size: int):
        if streamer is not None and batch_size > 1:
            raise ValueError(f"streamer works with one sequence at a time, got a batch of {batch_size}")
        self.streamer = streamer
        self.written = 0

    def write(self, batch: Batch, decoder) -> None:
        """Put what was committed since the last call."""
        if self.streamer is None:
            return
        sequence = batch.sequences[0]
        new_tokens = sequence.new_tokens[self.written :]
        if new_tokens:
            self.streamer.put(torch.tensor(new_tokens))
            self.written += len(new_tokens)
        if hasattr(self.streamer, "put_draft") and not sequence.finished:
            draft = decoder.preview(batch)
            if draft:
                self.streamer.put_draft(torch.tensor(draft))

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
