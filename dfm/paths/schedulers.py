"""Schedulers of mixture paths: which share kappa of the text is already data at time t.

Sources: Discrete Flow Matching (arXiv 2407.15595); kinetic-optimal schedules, arXiv 2412.03487.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice, check_count, check_range
from dfm.paths.sources import Source


class Scheduler(ABC):
    """A non-decreasing kappa with kappa(0) = 0 and kappa(1) = 1.

    A position is still noise at time t with probability 1 - kappa(t).
    """

    @abstractmethod
    def kappa(self, t: Tensor) -> Tensor:
        """kappa_t."""

    @abstractmethod
    def dkappa(self, t: Tensor) -> Tensor:
        """d kappa / dt."""

    def inverse(self, k: Tensor) -> Tensor:
        """The time at which kappa is ``k``, by bisection."""
        low, high = torch.zeros_like(k), torch.ones_like(k)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.kappa(middle) < k
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high

    def log_survival(self, t: Tensor) -> Tensor:
        """ln(1 - kappa_t), 0 at t = 0 and -inf at t = 1."""
        return torch.log1p(-self.kappa(t))

    def at(self, x1: Tensor) -> "Scheduler":
        """The scheduler of the data tokens ``x1``; all schedulers but the kinetic-optimal one are the same for each."""
        return self

    @property
    def is_shared(self) -> bool:
        """Whether all data tokens have the same kappa."""
        return True

    def shared(self) -> "Scheduler":
        """Itself, where all data tokens must have the same; ValueError if they have not."""
        return self


@dataclass(frozen=True)
class PowerScheduler(Scheduler):
    """kappa_t = t^power; power 1 is the linear scheduler.

    >>> PowerScheduler(2).kappa(torch.tensor([0.0, 0.5, 1.0])).tolist()
    [0.0, 0.25, 1.0]
    """

    power: float = 1.0

    def __post_init__(self):
        check_range("power", self.power, 0, include_low=False)

    def kappa(self, t: Tensor) -> Tensor:
        return t**self.power

    def dkappa(self, t: Tensor) -> Tensor:
        return self.power * t ** (self.power - 1)

    def inverse(self, k: Tensor) -> Tensor:
        return k ** (1 / self.power)


@dataclass(frozen=True)
class CosineScheduler(Scheduler):
    """kappa_t = 1 - cos(pi t / 2)."""

    def kappa(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi * t / 4) ** 2  # 1 - cos without its cancellation at small t

    def dkappa(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.sin(math.pi * t / 2)

    def inverse(self, k: Tensor) -> Tensor:
        return 4 / math.pi * torch.asin((k / 2).sqrt())

    def log_survival(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi * (1 - t) / 2).log()


@dataclass(frozen=True)
class CubicScheduler(Scheduler):
    """kappa_t = (a + b - 2) t^3 + (3 - 2a - b) t^2 + a t, with kappa'(0) = a = start_slope, kappa'(1) = b = end_slope.

    ValueError where kappa would fall somewhere. It does not exactly if a, b >= 0 and either a + b <= 3 or
    a^2 + b^2 + ab - 6a - 6b + 9 <= 0.
    """

    start_slope: float = 2.0
    end_slope: float = 2.0

    def __post_init__(self):
        a, b = self.start_slope, self.end_slope
        check_range("start_slope", a, 0)
        check_range("end_slope", b, 0)
        if a + b > 3 and a * a + b * b + a * b - 6 * a - 6 * b + 9 > 0:
            raise ValueError(
                "start_slope, end_slope must be a, b with a + b <= 3 or a^2 + b^2 + ab - 6a - 6b + 9 <= 0, where kappa "
                f"never falls, got {a}, {b}"
            )

    def kappa(self, t: Tensor) -> Tensor:
        a, b = self.start_slope, self.end_slope
        return (((a + b - 2) * t + (3 - 2 * a - b)) * t + a) * t

    def dkappa(self, t: Tensor) -> Tensor:
        a, b = self.start_slope, self.end_slope
        return (3 * (a + b - 2) * t + 2 * (3 - 2 * a - b)) * t + a


@dataclass(frozen=True, eq=False)
class KineticOptimalScheduler(Scheduler):
    """1 - kappa_t = sin^2((1 - t) W) / sin^2(W), W = arccos sqrt(p): the Fisher-Rao geodesic (arXiv 2412.03487).

    source_probability: p(x1), the source's probability of the data token, in [0, 1). A number if it is the same for all
    tokens: 0 for the mask source (kappa = sin^2(pi t / 2)), 1/V for the uniform one. Or the source distribution [V]: then kappa
    differs by token, ``at(x1)`` picks it for x1, and kappa(t) wants t as [..., 1] and gives [..., V].
    """

    source_probability: float | Tensor

    def __post_init__(self):
        p = torch.as_tensor(self.source_probability)
        if not bool(((p >= 0) & (p < 1)).all()):
            raise ValueError(f"source_probability must be in [0, 1), got {self.source_probability}")

    def at(self, x1: Tensor) -> "KineticOptimalScheduler":
        if self.is_shared:
            return self
        return replace(self, source_probability=self.source_probability[x1])

    @property
    def is_shared(self) -> bool:
        return not isinstance(self.source_probability, Tensor)

    def shared(self) -> "KineticOptimalScheduler":
        if not self.is_shared:
            raise ValueError("scheduler must be the same for all data tokens here; give source_probability as a number")
        return self

    def _angle(self, t: Tensor) -> Tensor:
        return torch.as_tensor(self.source_probability, dtype=t.dtype, device=t.device).sqrt().acos()

    def kappa(self, t: Tensor) -> Tensor:
        # sin^2(W) - sin^2((1 - t) W) as a product, which is exactly 0 at t = 0
        angle = self._angle(t)
        return torch.sin(t * angle) * torch.sin((2 - t) * angle) / torch.sin(angle) ** 2

    def dkappa(self, t: Tensor) -> Tensor:
        angle = self._angle(t)
        return angle * torch.sin(2 * (1 - t) * angle) / torch.sin(angle) ** 2

    def inverse(self, k: Tensor) -> Tensor:
        angle = self._angle(k)
        return 1 - torch.asin((1 - k).sqrt() * torch.sin(angle)) / angle

    def log_survival(self, t: Tensor) -> Tensor:
        angle = self._angle(t)
        return 2 * (torch.sin((1 - t) * angle) / torch.sin(angle)).log()


@dataclass(frozen=True)
class PiecewiseLinearScheduler(Scheduler):
    """Straight lines through kappa = values[i] at t = i / (len(values) - 1): what a fitted schedule gives."""

    values: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(self.values))
        rises = all(low <= high for low, high in zip(self.values, self.values[1:], strict=False))
        if len(self.values) < 2 or not rises or self.values[0] != 0 or self.values[-1] != 1:
            raise ValueError(f"values must rise from 0 to 1, got {self.values}")

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = torch.tensor(self.values, dtype=t.dtype, device=t.device)
        i = (t * (len(values) - 1)).long().clamp(0, len(values) - 2)
        return i, values[i], values[i + 1] - values[i]

    def kappa(self, t: Tensor) -> Tensor:
        i, start, rise = self._piece(t)
        return start + rise * (t * (len(self.values) - 1) - i)

    def dkappa(self, t: Tensor) -> Tensor:
        return self._piece(t)[2] * (len(self.values) - 1)


@dataclass(frozen=True)
class CallableScheduler(Scheduler):
    """A scheduler from two functions of t, kappa and its derivative, checked on a grid of ``grid`` cells.

    ValueError if kappa does not rise from 0 to 1 or if the derivative is not the one of kappa.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    grid: int = 1000

    def __post_init__(self):
        check_count("grid", self.grid, 2)
        t = torch.linspace(0, 1, self.grid + 1, dtype=torch.float64)
        kappa = self.function(t)
        steps = kappa.diff()
        if not (kappa[0].abs() < 1e-6 and (kappa[-1] - 1).abs() < 1e-6 and bool((steps >= -1e-9).all())):
            raise ValueError(f"function must rise from 0 to 1, got values from {kappa.min():g} to {kappa.max():g}")
        error = (self.derivative((t[1:] + t[:-1]) / 2) / self.grid - steps).abs().sum()
        if not error < 0.02:
            raise ValueError(
                f"derivative must be that of function, got one that is off by {error:g} in the integral over t"
            )

    def kappa(self, t: Tensor) -> Tensor:
        return self.function(t)

    def dkappa(self, t: Tensor) -> Tensor:
        return self.derivative(t)


def kinetic(source: Source) -> KineticOptimalScheduler:
    """The kinetic-optimal scheduler of a source whose tokens are equally likely, or that is the mask token."""
    distribution = source.probabilities(torch.empty(0, dtype=torch.float64))
    return KineticOptimalScheduler(0.0 if source.mask_id is not None else distribution.max().item())


# The source makes a difference to some.
SCHEDULERS: dict[str, Callable[[Source], Scheduler]] = {
    "linear": lambda source: PowerScheduler(),
    "quadratic": lambda source: PowerScheduler(2.0),
    "cubic": lambda source: CubicScheduler(),
    "cosine": lambda source: CosineScheduler(),
    "kinetic": kinetic,
}


def named_scheduler(name: str, source: Source) -> Scheduler:
    """The scheduler called ``name`` in :data:`SCHEDULERS`, for a source."""
    check_choice("scheduler", name, SCHEDULERS)
    return SCHEDULERS[name](source)
