"""Fitted schedules: how many tokens to reveal in each of K rounds, from the loss by number of visible tokens.

L(j), in nats: mean cross-entropy of one masked token when j others, chosen at random, are visible; j = 0 .. n - 1. A
schedule is its cuts 0 = c_0 < c_1 < .. < c_K = n: round k reveals c_{k+1} - c_k tokens. With true conditional entropies
its excess is the mean KL between data and samples at a given random order (chain rule; arXiv 2511.04647, 2510.25544).
Measure L on one half of the data and score on the other: a curve scored on itself flatters its schedule.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from decoding.inputs.checks import check_count
from dfm.paths.schedulers import PiecewiseLinearScheduler, Scheduler


@dataclass(frozen=True)
class FittedSchedule(Scheduler):
    """A scheduler for K rounds: kappa at t = k / K is the share revealed before round k, with straight lines between.

    cuts: numbers of revealed tokens before each round and at the end, rising from 0. As a scheduler it serves texts of
    any length, with ``time_grid(K)``.
    """

    cuts: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "cuts", tuple(self.cuts))
        if (
            len(self.cuts) < 2
            or self.cuts[0] != 0
            or any(a >= b for a, b in zip(self.cuts, self.cuts[1:], strict=False))
        ):
            raise ValueError(f"cuts must be rising numbers from 0, got {self.cuts}")

    @property
    def quotas(self) -> tuple[int, ...]:
        """Tokens to reveal in each round."""
        return tuple(b - a for a, b in zip(self.cuts, self.cuts[1:], strict=False))

    def kappa(self, t: Tensor) -> Tensor:
        return self._lines.kappa(t)

    def dkappa(self, t: Tensor) -> Tensor:
        return self._lines.dkappa(t)

    @property
    def _lines(self) -> PiecewiseLinearScheduler:
        return PiecewiseLinearScheduler(tuple(cut / self.cuts[-1] for cut in self.cuts))

    def excess(self, losses: Tensor) -> float:
        """sum_k sum_{j = c_k}^{c_{k+1} - 1} (L(c_k) - L(j)) in nats, for L [n]."""
        if len(losses) != self.cuts[-1]:
            raise ValueError(f"losses must be {self.cuts[-1]} numbers, got {len(losses)}")
        starts = torch.tensor(self.cuts[:-1]).repeat_interleave(torch.tensor(self.quotas))
        return (losses[starts] - losses).sum().item()

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "FittedSchedule":
        """Read what ``save`` has written; ValueError for anything else."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise ValueError(f"schedule {str(path)!r} does not exist") from None
        except (json.JSONDecodeError, TypeError):
            raise ValueError(
                f"schedule {str(path)!r} must be a JSON object with 'cuts', rising numbers from 0"
            ) from None


def fit_schedule(losses: Tensor, rounds: int) -> FittedSchedule:
    """The cuts of least excess in K = ``rounds`` rounds, for L [n], in O(K n^2):

    F_k(b) = min_{a < b} F_{k-1}(a) + (b - a) L(a) - sum_{j=a}^{b-1} L(j)
    """
    n = len(losses)
    check_count("rounds", rounds, 1, n)
    losses = losses.double()
    summed = torch.cat([losses.new_zeros(1), losses.cumsum(0)])
    a, b = torch.arange(n)[:, None], torch.arange(n + 1)
    cost = torch.where(b > a, (b - a) * losses[:, None] - (summed[b] - summed[a]), torch.inf)  # [n, n + 1]
    best = losses.new_full((n,), torch.inf)
    best[0] = 0
    origins = []
    for _ in range(rounds):
        total, origin = (best[:, None] + cost).min(0)
        origins.append(origin)
        best = total[:n]
    cuts = [n]
    for origin in reversed(origins):
        cuts.append(int(origin[cuts[-1]]))
    return FittedSchedule(tuple(reversed(cuts)))


def isotonic_decreasing(values: Sequence[float] | Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """The falling curve [n] nearest to ``values`` [n] in weighted squares (pool adjacent violators), float64.

    weights: how many measurements each value is the mean of; 1 if not given.

    >>> isotonic_decreasing([3.0, 1.0, 2.0]).tolist()
    [3.0, 1.5, 1.5]
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, [1.0] * len(values) if weights is None else weights, strict=True):
        pool = (float(value), float(weight), 1)
        while pools and pools[-1][0] < pool[0]:
            mean, mass, length = pools.pop()
            total = mass + pool[1]
            pool = ((mean * mass + pool[0] * pool[1]) / total, total, length + pool[2])
        pools.append(pool)
    return torch.tensor([mean for mean, _, length in pools for _ in range(length)], dtype=torch.float64)
