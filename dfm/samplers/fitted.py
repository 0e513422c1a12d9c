"""A sampler whose every step has its own numbers, fitted to a frozen model: Bespoke solvers (arXiv 2403.01329) on tokens."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from decoding.inputs.checks import check_choice, check_range
from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.rates.kernels import largest_beta
from dfm.sampling.grid import GridSampler, time_grid
from dfm.sampling.state import FlowState, Query, Step

SOURCES = ("mask", "uniform")


@dataclass(frozen=True)
class StepSettings:
    """The 3 K - 1 free numbers of a sampler of K steps; as a function of a path and a grid, that sampler.

    source: of the model they were fitted to. times: K + 1, rising from 0 to 1.
    temperatures: K, above 0; p_1t is raised to 1 / temperature. With do_sample=False they have no effect.
    shares: K numbers in [0, 1], how much a step corrects, as a share of what its kernel can: with a mask source the
        probability of masking a token again is that share of min(1, (1 - k') / k), as ReMDM's ``eta``.
    start, fitted: the score of what the fit began with and of these numbers on texts of neither (:mod:`dfm.fitting`).
    """

    source: str
    times: tuple[float, ...]
    temperatures: tuple[float, ...]
    shares: tuple[float, ...]
    start: float | None = None
    fitted: float | None = None

    def __post_init__(self):
        check_choice("source", self.source, SOURCES)
        for name in ("times", "temperatures", "shares"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        rises = all(low < high for low, high in zip(self.times, self.times[1:], strict=False))
        if len(self.times) < 2 or not rises or self.times[0] != 0 or self.times[-1] != 1:
            raise ValueError(f"times must be two or more numbers rising from 0 to 1, got {self.times}")
        for name, high in (("temperatures", math.inf), ("shares", 1.0)):
            values = getattr(self, name)
            if len(values) != self.steps:
                raise ValueError(f"{name} must be {self.steps} numbers, one for each step, got {len(values)}")
            for value in values:
                check_range(name, value, 0, high, include_low=name == "shares")

    @classmethod
    def even(cls, source: str, steps: int, share: float = 0.0) -> "StepSettings":
        """Even times and the model's own distribution: the exact sampler, or with a share ReMDM's "rescale"."""
        return cls(source, time_grid(steps), (1.0,) * steps, (share,) * steps)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def __call__(self, path: MixturePath, grid: tuple[float, ...]) -> "FittedSampler":
        if len(grid) - 1 != self.steps:
            raise ValueError(f"steps must be {self.steps}, as the sampler was fitted, or left out, got {len(grid) - 1}")
        return FittedSampler(path, self.times, self.temperatures, self.shares)

    def save(self, file: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        scratch = Path(f"{file}.tmp")
        scratch.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(scratch, file)

    @classmethod
    def load(cls, file: str | Path) -> "StepSettings":
        """Read what ``save`` has written; ValueError for anything else."""
        try:
            return cls(**json.loads(Path(file).read_text()))
        except FileNotFoundError:
            raise ValueError(f"sampler {str(file)!r} does not exist") from None
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError):
            raise ValueError(
                f"sampler {str(file)!r} must be a JSON object with 'source', 'times', 'temperatures' and 'shares', as "
                f"setflow finetune fit-sampler writes it"
            ) from None


@dataclass(frozen=True)
class FittedSampler(GridSampler):
    """The mixed kernel in every step, with the numbers of :class:`StepSettings`.

    With temperatures 1 and shares 0 it is ExactX1, token for token; any beta of Corrector, and any eta of ReMDM's "rescale",
    is a choice of shares.
    """

    path: MixturePath
    temperatures: tuple[float, ...]
    shares: tuple[float, ...]

    def numbers(self, state: FlowState, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """t, s, temperature and share [B] of the steps that the texts take."""
        grid, temperatures, shares = (
            torch.tensor(values, dtype=state.t.dtype, device=state.t.device)
            for values in (self.grid, self.temperatures, self.shares)
        )
        step = (torch.searchsorted(grid, state.t, right=True) - 1).clamp(0, len(temperatures) - 1)
        return state.t, s, temperatures[step], shares[step]

    def step(self, state: FlowState, draws: Draws) -> Step:
        t, s, temperature, share = self.numbers(state, self.next_time(state))
        source, scheduler = self.path.source, self.path.scheduler.shared()
        k, k_next, is_mask = scheduler.kappa(t), scheduler.kappa(s), source.mask_id is not None
        corrects = (share > 0) & (k > 0) & (s < 1)
        beta = torch.where(corrects, share * largest_beta(k, k_next, is_mask), 0)
        to_data = torch.where(s >= 1, 1, (1 + beta) * (k_next - k) / (1 - k))
        to_noise = torch.where(corrects, beta * (k_next - k) / torch.where(k > 0, k, 1), 0)
        undecided = state.free & state.masked if is_mask else state.free
        jumps = draws.happens(to_data, undecided)
        if is_mask:
            again = draws.happens(to_noise, state.free & ~state.masked & corrects[:, None])
        else:
            left = torch.where(corrects, 1 - to_data, 1)
            again = draws.happens(to_noise / left.clamp_min(1e-12), state.free & ~jumps & corrects[:, None])
        p1 = yield Query(state.x, state.t, state.masked, only=jumps)
        state.write(draws.rows(sharpened(p1, temperature[:, None].expand(jumps.shape)[jumps]), jumps), jumps)
        if is_mask:
            state.remask(again, source.mask_id)
        else:
            noise = source.probabilities(p1).expand(int(again.sum()), -1)
            state.write(draws.rows(noise, again), again)
        state.advance(s.detach(), self.grid[-1])


def sharpened(p1: Tensor, temperature: Tensor) -> Tensor:
    """The distributions [N, V] raised to 1 / temperature [N] and normalised; those at 1 as they are."""
    if bool((temperature == 1).all()) and not temperature.requires_grad:
        return p1
    scores = p1.log().clamp_min(-1e6)  # what is impossible stays so, with a slope by the temperature
    return (scores / temperature[:, None].to(p1)).softmax(-1)
