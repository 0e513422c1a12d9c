"""The generation loop, written once for all decoders."""

import torch

from decoding.batch import Batch
from decoding.decoder import Decoder
from decoding.forward.model import EngineModel
from decoding.forward.rows import RowList, Rows
from decoding.streaming import StreamWriter

PREFILL_CHUNK = 512  # prompt tokens per forward; the last chunk rides with the first rows that decode


@torch.no_grad()
def decode(engine: EngineModel, decoder: Decoder, batch: Batch, stream: StreamWriter) -> int:
    """Run ``batch`` to its end; returns the number of forwards that only filled the cache."""
    prefills = prefill(engine, batch) if decoder.prefills else 0
    decoder.begin(batch)
    in_cache = batch.unfinished
    while unfinished := batch.unfinished:
        if len(unfinished) < len(in_cache):  # finished sequences leave the batch, their keys and values with them
            kept = [place for place, sequence in enumerate(in_cache) if not sequence.finished]
            engine.cache.reorder_cache(torch.tensor(kept))
            in_cache = unfinished
        logits = engine.forward(Rows.pack(decoder.plan(batch), engine.device))
        for sequence in unfinished:
            sequence.forwards += 1
        decoder.absorb(batch, logits)
        stream.write(batch, decoder)
    return prefills


def prefill(engine: EngineModel, batch: Batch) -> int:
    """Run all but the last chunk of every prompt; returns the number of forwards."""
    forwards = 0
    while any(len(sequence.pending) > PREFILL_CHUNK for sequence in batch.sequences):
        lists = []
        for sequence in batch.sequences:
            rows = RowList()
            if len(sequence.pending) > PREFILL_CHUNK:
                rows.add_causal(sequence.pending[:PREFILL_CHUNK], sequence.cached)
                sequence.cached += PREFILL_CHUNK
            lists.append(rows)
        engine.forward(Rows.pack(lists, engine.device))
        forwards += 1
    return forwards


def commit_pending(engine: EngineModel, sequence) -> None:
    """Give the tokens that are still pending, but for the last, their keys and values, as ``generate`` leaves a cache."""
    if len(sequence.pending) > 1:
        rows = RowList()
        rows.add_causal(sequence.pending[:-1], sequence.cached)
        engine.forward(Rows.pack([rows], engine.device))
        sequence.cached = len(sequence.tokens) - 1
