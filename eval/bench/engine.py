"""What the engine's forwards cost by batch, context and rows.

A forward at a small batch waits for the weights: on an idle device it takes as long as reading them once, whatever the
number of rows, until the arithmetic of the rows takes longer. How many rows ride for nothing decides what decoding several
tokens at a time can gain. So each time is also told as gigabytes of weights per second, beside what a plain copy reaches.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from decoding import Engine
from decoding.forward.cache import SlotCache
from decoding.forward.rows import RowList
from eval.devices import clock

POINT_SECONDS = 1.0  # for one number, after what warms up; what is slower is run fewer times
COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes, many times what a cache holds
Row = dict[str, Any]


def measure_forwards(
    model: PreTrainedModel,
    batch_sizes: Iterable[int],
    contexts: Iterable[int],
    rows: Iterable[int],
    copied: float,
    repeats: int = 10,
    static: bool = False,
) -> Iterator[Row]:
    """Yield the median milliseconds of one step of the engine, for each batch size, context and number of rows.

    A step packs the rows, moves them to the device, runs them behind so many tokens in the cache, and the head on one row of
    each sequence, as when decoding. One row is measured in any case: ``slowdown`` is relative to it.

    copied: gigabytes per second of :func:`copy_speed`. static: of the static path.

    Raises ValueError, before anything is measured, if a context leaves the model no room for the rows. A point that does
    not fit into memory gives a row that says so.
    """
    counts, contexts = sorted({1, *rows}), list(contexts)
    check_contexts(model.config, contexts, counts[-1], "rows")
    speed = WeightSpeed(model, copied)
    for batch_size in batch_sizes:
        for context in contexts:
            seconds = _forward_seconds(model, batch_size, context, counts, repeats, static)
            for count in counts:
                row = {"what": "forward", "batch_size": batch_size, "context": context, "rows": count}
                if count not in seconds:
                    yield row | {"out_of_memory": True}
                    continue
                taken = seconds[count]
                row |= {"milliseconds": round(1e3 * taken, 3), "slowdown": round(taken / seconds[1], 3)}
                yield row | speed.of(taken)


def _forward_seconds(
    model: PreTrainedModel, batch_size: int, context: int, counts: list[int], repeats: int, static: bool
) -> dict[int, float]:
    """The median seconds of a step by its rows; the numbers of rows take turns. What does not fit into memory is left out."""
    engine = Engine(model, cache_chunk=context + counts[-1], static=static)  # so that a cache is allocated once
    runs: dict[int, Callable[[], float]] = {}
    try:
        cache = _filled_cache(engine, batch_size, context)
        for count in counts:
            run = _step(engine, cache, batch_size, context, count)
            run()  # warms up
            runs[count] = run
    except torch.OutOfMemoryError:  # what has more rows would not fit either
        pass
    found = {count: [] for count in runs}
    started = time.perf_counter()
    for _ in range(repeats):
        for count, run in runs.items():
            found[count].append(run())
        if time.perf_counter() - started > POINT_SECONDS * len(counts):
            break
    return {count: statistics.median(seconds) for count, seconds in found.items()}


def _filled_cache(engine: Engine, batch_size: int, context: int) -> SlotCache:
    """A cache with noise in every slot: the time of a forward does not depend on what they hold."""
    cache = engine.new_cache(batch_size)
    _step(engine, cache, batch_size, context, 1)()
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def _step(engine: Engine, cache: SlotCache, batch_size: int, context: int, count: int) -> Callable[[], float]:
    """Seconds of one step, as a function to call again and again."""
    lists = [RowList() for _ in range(batch_size)]
    for rows in lists:
        rows.add_causal([1] * count, context)

    def run() -> float:
        started = clock(engine.device)
        step = engine.step(lists, cache)
        engine.head(step.hidden_states[:, -1])
        return clock(engine.device) - started

    return run


class WeightSpeed:
    """A time per forward as gigabytes of weights per second."""

    def __init__(self, model: PreTrainedModel, copied: float):
        self.gigabytes, self.copied = weight_bytes(model) / 1e9, copied

    def of(self, seconds: float) -> Row:
        speed = self.gigabytes / seconds
        return {"weight_gigabytes_per_second": round(speed, 2), "share_of_copy": round(speed / self.copied, 3)}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a forward reads: all but an embedding table that is not the head as well."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    skipped = 0 if table is head else table.nbytes
    # What torchao rounded says how large it would be in full; its codes lie in ``qdata``.
    return sum(getattr(parameter, "qdata", parameter).nbytes for parameter in model.parameters()) - skipped


def copy_speed(device: torch.device, repeats: int = 10) -> float:
    """Gigabytes per second of a copy within the memory of ``device``, read and written; the median of ``repeats``."""
    source = torch.ones(COPIED.get(device.type, COPIED["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> float:
        started = clock(device)
        target.copy_(source)
        return clock(device) - started

    return round(2 * source.nbytes / _median_seconds(run, repeats) / 1e9, 1)


def _median_seconds(run: Callable[[], float], repeats: int) -> float:
    """The median of what ``run`` returns, called once to warm up and then ``repeats`` times, or for POINT_SECONDS."""
    run()
    found, started = [], time.perf_counter()
    while len(found) < repeats and (not found or time.perf_counter() - started < POINT_SECONDS):
        found.append(run())
    return statistics.median(found)


def check_contexts(config: PretrainedConfig, contexts: Iterable[int], more: int, named: str) -> None:
    """Raise ValueError if ``more`` tokens behind one of ``contexts`` leave the positions that the model has."""
    most = config.max_position_embeddings
    for context in contexts:
        if context + more > most:
            raise ValueError(
                f"context must be at most {most - more}, the {most} positions of the model less {more} {named}, got {context}"
            )
