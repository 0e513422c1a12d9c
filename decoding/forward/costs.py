"""What a step costs by its number of rows, measured on this machine with this model."""

import time
from collections.abc import Callable, Sequence

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXT = 64  # tokens in the cache while measuring
ROUNDS = 5
BUDGET = 2.0  # seconds; slow models are measured with fewer rounds


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


def measure_row_costs(step_seconds: Callable[[int], float], most_rows: int) -> RowCosts:
    """The cost curve up to ``most_rows``, from the seconds that a step of so many rows takes."""
    counts = [rows for rows in ROWS if rows < most_rows] + [most_rows]
    best = dict.fromkeys(counts, float("inf"))
    started = time.perf_counter()
    for round_ in range(ROUNDS):
        for rows in counts:  # interleaved, so that a slow moment does not hit one count alone
            seconds = step_seconds(rows)
            if round_:  # the first round warms up
                best[rows] = min(best[rows], seconds)
        if round_ and time.perf_counter() - started > BUDGET:
            break
    return RowCosts(counts, [best[rows] for rows in counts])
