"""Samplers and schedulers by name, for decoders and command lines."""

from collections.abc import Callable
from dataclasses import dataclass

from decoding.checks import check_choice
from dfm.paths import MixturePath
from dfm.samplers import (
    D3PM,
    P2,
    Adaptive,
    CanvasRule,
    Corrected,
    Corrector,
    Euler,
    EulerX1,
    ExactX1,
    FirstHitting,
    LooGibbs,
    Psi,
    ReMDM,
    RuleSampler,
    Sampler,
    ScheduledTopK,
    TauLeap,
    ThetaTrapezoidal,
    Uniformisation,
)
from dfm.schedulers import (
    CosineScheduler,
    CubicScheduler,
    KineticOptimalScheduler,
    PowerScheduler,
    Scheduler,
)
from dfm.sources import Source
from dfm.velocity import ForwardVelocity

Grid = tuple[float, ...]
SOURCES = ("mask", "uniform")
# These rank positions by their laws, so that a law sharpened to one token would leave them nothing to rank by.
SCORING = (ScheduledTopK, RuleSampler, CanvasRule, P2)


@dataclass(frozen=True)
class NamedSampler:
    """How to make a sampler.

    make: from a path and a grid of times. sources: for which it works. on_grid: it walks along the grid, one or more
    evaluations a step; others choose their own number. keeps: with a mask source, what it has revealed stays.
    """

    make: Callable[[MixturePath, Grid], Sampler]
    sources: tuple[str, ...] = SOURCES
    on_grid: bool = True
    keeps: bool = False


SAMPLERS: dict[str, NamedSampler] = {
    "exact": NamedSampler(ExactX1, keeps=True),
    "euler": NamedSampler(lambda path, grid: Euler(path, grid, ForwardVelocity(path)), keeps=True),
    "euler_x1": NamedSampler(lambda path, grid: EulerX1(path, grid, ForwardVelocity(path)), keeps=True),
    "tau_leap": NamedSampler(lambda path, grid: TauLeap(path, grid, ForwardVelocity(path)), keeps=True),
    "theta_trapezoidal": NamedSampler(
        lambda path, grid: ThetaTrapezoidal(path, grid, ForwardVelocity(path)), keeps=True
    ),
    "d3pm": NamedSampler(D3PM, keeps=True),
    "psi": NamedSampler(Psi),
    "corrector": NamedSampler(Corrector),
    "adaptive": NamedSampler(lambda path, grid: Adaptive(Corrector(path, grid))),
    "remdm": NamedSampler(lambda path, grid: ReMDM(path, grid, "rescale", 0.1), ("mask",)),
    "topk": NamedSampler(ScheduledTopK, ("mask",), keeps=True),
    "p2": NamedSampler(P2, ("mask",)),
    "first_hitting": NamedSampler(lambda path, grid: FirstHitting(path), ("mask",), on_grid=False, keeps=True),
    "gibbs": NamedSampler(lambda path, grid: Corrected(ExactX1(path, grid), LooGibbs(path)), ("uniform",)),
    "uniformisation": NamedSampler(lambda path, grid: Uniformisation(path), ("uniform",), on_grid=False),
}

SCHEDULERS = ("linear", "quadratic", "cubic", "cosine", "kinetic")


def named_scheduler(name: str, source: Source) -> Scheduler:
    """The scheduler called ``name``; "kinetic" depends on the source.

    >>> from dfm import MaskSource
    >>> named_scheduler("kinetic", MaskSource(3, 2)).source_probability
    0.0
    """
    check_choice("scheduler", name, SCHEDULERS)
    if name == "kinetic":
        excluded = len(set(getattr(source, "excluded", ())))
        return KineticOptimalScheduler(0.0 if source.mask_id is not None else 1 / (source.vocab_size - excluded))
    return {
        "linear": PowerScheduler(),
        "quadratic": PowerScheduler(2.0),
        "cubic": CubicScheduler(),
        "cosine": CosineScheduler(),
    }[name]


def ranks_positions(sampler: Sampler) -> bool:
    """Whether the sampler ranks positions by their laws."""
    return isinstance(sampler, SCORING)


def rule_sampler(path: MixturePath, rule) -> Sampler:
    """The sampler that follows a rule of :mod:`decoding.rules`, for either kind of source."""
    return RuleSampler(path.source, rule) if path.source.mask_id is not None else CanvasRule(path, rule)
