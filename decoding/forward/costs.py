"""What a forward costs by its number of rows, measured on this machine with this model."""

import time
import weakref
from collections.abc import Sequence

import torch

from decoding.forward.model import EngineModel
from decoding.forward.rows import RowList, Rows

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXT = 64  # tokens in the cache while measuring
ROUNDS = 5
BUDGET = 2.0  # seconds; slow models are measured with fewer rounds

_measured: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class RowCosts:
    """Seconds of one step, forward, head on one row and choice included, for any number of rows per sequence."""

    def __init__(self, rows: Sequence[int], seconds: Sequence[float]):
        self.rows = list(rows)
        # More rows are never cheaper; where noise says so, the larger count is believed.
        self.seconds = list(seconds)
        for i in range(len(self.seconds) - 2, -1, -1):
            self.seconds[i] = min(self.seconds[i], self.seconds[i + 1])

    def __call__(self, rows: float) -> float:
        """Linear between measured points, and beyond the last one."""
        i = next((i for i, known in enumerate(self.rows[1:-1], 1) if rows <= known), len(self.rows) - 1)
        (r0, r1), (s0, s1) = self.rows[i - 1 : i + 1], self.seconds[i - 1 : i + 1]
        return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)


def measure_row_costs(engine: EngineModel, batch_size: int, most_rows: int) -> RowCosts:
    """The cost curve up to ``most_rows``; measured once for each model, dtype, device and batch size."""
    model = engine.model
    key = (model.dtype, str(engine.device), batch_size, torch.get_num_threads())
    curves = _measured.setdefault(model, {})
    if key not in curves or curves[key].rows[-1] < most_rows:
        curves[key] = _measure(EngineModel(model, batch_size), batch_size, most_rows)
    return curves[key]


def _measure(engine: EngineModel, batch_size: int, most_rows: int) -> RowCosts:
    counts = [rows for rows in ROWS if rows < most_rows] + [most_rows]
    best = dict.fromkeys(counts, float("inf"))
    _step(engine, batch_size, 0, CONTEXT)
    started = time.perf_counter()
    for round_ in range(ROUNDS):
        for rows in counts:  # interleaved, so that a slow moment does not hit one count alone
            seconds = _step(engine, batch_size, CONTEXT, rows)
            if round_ or ROUNDS == 1:  # the first round warms up
                best[rows] = min(best[rows], seconds)
        if round_ and time.perf_counter() - started > BUDGET:
            break
    return RowCosts(counts, [best[rows] for rows in counts])


def _step(engine: EngineModel, batch_size: int, start: int, count: int) -> float:
    started = time.perf_counter()
    lists = []
    for _ in range(batch_size):
        rows = RowList()
        rows.add_causal([0] * count, start)
        lists.append(rows)
    logits = engine.forward(Rows.pack(lists, engine.device))
    logits(range(batch_size), [count - 1] * batch_size).argmax(-1).tolist()
    return time.perf_counter() - started
