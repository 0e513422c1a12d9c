"""Fit the numbers of a few-step sampler to the distribution that its model draws from in many steps.

As Bespoke solvers (arXiv 2403.01329) are fitted to a frozen velocity, so are these to a frozen posterior network: it is
not trained and nothing is differentiated through it. What is minimised is the distance of two clouds of texts behind the
same prompts, from few steps and from many, in the sense of a kernel (maximum mean discrepancy, arXiv 0805.2368):

    E k(x, x') - 2 E k(x, y) + E k(y, y'),   k(x, y) = sum over n in 1, 2, 4 of the share of places where n tokens agree

which is 0 if every n tokens in a row have the right distribution given the prompt, and also pays for diversity, which
likelihood under the model would not. Tokens are drawn, so the gradient is that of their log-probability times how much
they help (REINFORCE), whose terms are functions of few numbers for each text and step.

Shapes: P prompts, M texts of each, L positions, K steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from decoding.inputs.checks import check_count, check_range
from dfm.draws import BatchDraws
from dfm.paths.mixture import MixturePath
from dfm.samplers.fitted import FittedSampler, StepSettings
from dfm.samplers.kernels import ExactX1
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, run_step, sample
from dfm.sampling.state import FlowState, Sampler

RUNS = (1, 2, 4)  # lengths of the runs of tokens that the kernel compares
LEAST_SHARE = 0.02  # a share of 0 would never correct, so never learn that it should


@dataclass(frozen=True)
class Prompts:
    """Canvases to be filled. x: [P, L]. frozen: [P, L] bool, what is given. posterior_of: the network for a batch of
    canvases with the rows ``index`` [B] of these."""

    x: Tensor
    frozen: Tensor
    posterior_of: Callable[[Tensor], Posterior]

    def texts(self, sampler: Sampler, count: int, seed: int) -> Tensor:
        """[P, M, L]: ``count`` texts of each prompt."""
        index = torch.arange(len(self.x)).repeat_interleave(count)
        draws = BatchDraws(torch.Generator().manual_seed(seed))
        draws.generators = [draws.generator] * len(index)
        out = sample(self.posterior_of(index), sampler, self.x[index], self.frozen[index], draws)
        return out.tokens.unflatten(0, (len(self.x), count))

    def subset(self, rows: Tensor) -> "Prompts":
        """The prompts ``rows``."""
        return Prompts(self.x[rows], self.frozen[rows], lambda index: self.posterior_of(rows[index]))


def agreement(x: Tensor, y: Tensor, free: Tensor) -> Tensor:
    """k [P, M, M'] of texts x [P, M, L] and y [P, M', L], over the places that are ``free`` [P, L] bool."""
    same = (x[:, :, None] == y[:, None]) & free[:, None, None]
    total, places = torch.zeros(same.shape[:3], dtype=torch.float64), free
    for n in range(1, max(RUNS) + 1):
        if n > 1:
            same = same[..., :-1] & (x[:, :, None, n - 1 :] == y[:, None, :, n - 1 :])
            places = places[..., :-1] & free[:, n - 1 :]
            same = same & places[:, None, None]
        if n in RUNS and same.shape[-1]:
            total += same.sum(-1) / places.sum(-1).clamp_min(1)[:, None, None]
    return total


def discrepancy(x: Tensor, y: Tensor, free: Tensor) -> float:
    """The unbiased estimate, mean over prompts, for x [P, M, L] and y [P, M', L] with at least two texts each."""
    return (
        (_others(agreement(x, x, free)) + _others(agreement(y, y, free)) - 2 * agreement(x, y, free).mean((1, 2)))
        .mean()
        .item()
    )


def _others(k: Tensor) -> Tensor:
    """The mean [P] of k [P, M, M] over pairs of different texts."""
    count = k.shape[-1]
    return (k.sum((1, 2)) - k.diagonal(dim1=1, dim2=2).sum(-1)) / (count * (count - 1))


@dataclass(frozen=True)
class Fit:
    """How to fit. iterations: of the gradient; texts: of each prompt in one; batch: prompts in one.

    many_steps: of the sampler that is aimed at. held_out: share of the prompts by which start and result are compared;
    what is worse there is not taken. learning_rate: of Adam, on the logarithms of lengths and temperatures and on shares.
    """

    iterations: int = 30
    texts: int = 4
    batch: int = 8
    many_steps: int = 64
    held_out: float = 0.5
    learning_rate: float = 0.1
    seed: int = 0

    def __post_init__(self):
        for name in ("iterations", "batch", "many_steps"):
            check_count(name, getattr(self, name))
        check_count("texts", self.texts, 2)
        check_range("held_out", self.held_out, 0, 1, include_low=False, include_high=False)
        check_range("learning_rate", self.learning_rate, 0, include_low=False)


def fit_sampler(
    prompts: Prompts,
    path: MixturePath,
    start: StepSettings,
    fit: Fit,
    advance: Callable[[str], None] = lambda what: None,
) -> StepSettings:
    """The numbers with the least discrepancy that was found, never more than the start's on held-out prompts.

    ``advance`` is told after every part of the work: one for each side of the prompts, each iteration, and the end.
    Raises ValueError for fewer than two prompts.
    """
    count = len(prompts.x)
    check_count("prompts", count, 2)
    cut = min(count - 1, max(1, round(count * (1 - fit.held_out))))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(fit.seed))
    sides = [prompts.subset(order[:cut]), prompts.subset(order[cut:])]
    many = ExactX1(path, time_grid(fit.many_steps))
    targets = []
    for i, side in enumerate(sides):
        targets.append(side.texts(many, fit.texts, fit.seed + 1 + i))
        advance("targets")
    numbers = _Numbers.of(start)
    optimiser = torch.optim.Adam(numbers.parameters(), fit.learning_rate, betas=(0.8, 0.95))
    generator, trail = torch.Generator().manual_seed(fit.seed + 3), []
    for i in range(fit.iterations):
        rows = torch.randperm(cut, generator=generator)[: fit.batch]
        _set_gradient(numbers, sides[0].subset(rows), targets[0][rows], path, fit.texts, fit.seed + 10 + i)
        optimiser.step()
        numbers.keep_in_range()
        trail.append([value.detach().clone() for value in numbers.parameters()])
        advance("fit")
    late = trail[len(trail) // 2 :]  # the mean of the later half has less of the gradient's noise
    with torch.no_grad():
        for value, found in zip(numbers.parameters(), zip(*late, strict=True), strict=True):
            value.copy_(torch.stack(found).mean(0))
    candidates = [start, numbers.settings(start.source)]
    scores = []
    for candidate in candidates:
        sampler = candidate(path, candidate.times)
        found = sides[1].texts(sampler, max(8, fit.texts), fit.seed + 4)
        scores.append(discrepancy(found, targets[1], ~sides[1].frozen))
    advance("compared")
    best = min((0, 1), key=lambda i: scores[i])
    return replace(candidates[best], start=scores[0], fitted=scores[best])


@dataclass
class _Numbers:
    """The parameters of a fit: logits of the steps' lengths, log temperatures and shares, [K] float64 each."""

    lengths: Tensor
    log_temperatures: Tensor
    shares: Tensor

    @classmethod
    def of(cls, start: StepSettings) -> "_Numbers":
        times = torch.tensor(start.times, dtype=torch.float64)
        shares = torch.tensor(start.shares, dtype=torch.float64).clamp(LEAST_SHARE, 1)
        temperatures = torch.tensor(start.temperatures, dtype=torch.float64)
        return cls(*(value.requires_grad_() for value in (times.diff().log(), temperatures.log(), shares)))

    def parameters(self) -> list[Tensor]:
        return [self.lengths, self.log_temperatures, self.shares]

    def times(self) -> Tensor:
        """[K + 1], rising from 0 to 1."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.softmax(0).cumsum(0)])

    @torch.no_grad()
    def keep_in_range(self) -> None:
        self.shares.clamp_(LEAST_SHARE, 1 - LEAST_SHARE)
        self.log_temperatures.clamp_(-3, 1)
        self.lengths.sub_(self.lengths.mean()).clamp_(-4, 4)

    def settings(self, source: str) -> StepSettings:
        times = self.times().detach().tolist()
        shares = [0.0 if share <= LEAST_SHARE else share for share in self.shares.tolist()]
        return StepSettings(source, (*times[:-1], 1.0), tuple(self.log_temperatures.exp().tolist()), tuple(shares))


@dataclass(frozen=True)
class _Traced(FittedSampler):
    """The sampler with numbers of its own for every text, so that one gradient tells them apart."""

    leaves: list[list[Tensor]] = field(default_factory=list)

    def numbers(self, state: FlowState, s: Tensor) -> tuple[Tensor, ...]:
        values = [value.clone().requires_grad_() for value in super().numbers(state, s)]
        self.leaves.append(values)
        return tuple(values)


class _TracedDraws(BatchDraws):
    """Sums the log-probability [B] of all that is drawn, as a function of what the probabilities are made of."""

    total: Tensor | float = 0.0

    def happens(self, probability: Tensor, where: Tensor) -> Tensor:
        drawn = super().happens(probability.detach(), where)
        odds = probability.clamp(1e-9, 1 - 1e-9)
        self.total = self.total + drawn.sum(-1) * odds.log() + (where & ~drawn).sum(-1) * (1 - odds).log()
        return drawn

    def rows(self, distribution: Tensor, where: Tensor) -> Tensor:
        tokens = super().rows(distribution.detach(), where)
        chosen = distribution.gather(-1, tokens[where][:, None])[:, 0].clamp_min(1e-30).log().double()
        spread = torch.zeros(where.shape, dtype=torch.float64).masked_scatter(where, chosen)
        self.total = self.total + spread.sum(-1)
        return tokens


def _set_gradient(numbers: _Numbers, prompts: Prompts, targets: Tensor, path, texts: int, seed: int) -> None:
    """Write the gradient of the discrepancy into the numbers' ``grad``."""
    times = numbers.times()
    grid = (*times.detach().tolist()[:-1], 1.0)
    sampler = _Traced(path, grid, tuple(numbers.log_temperatures.exp().tolist()), tuple(numbers.shares.tolist()))
    index = torch.arange(len(prompts.x)).repeat_interleave(texts)
    draws, posterior = _TracedDraws(torch.Generator().manual_seed(seed)), prompts.posterior_of(index)
    state = FlowState.start(prompts.x[index], prompts.frozen[index], path.source, draws)
    slopes = []

    def answer(query: Any) -> Tensor:
        with torch.no_grad():
            return posterior.answer(query, state)

    while not state.done.all():
        draws.total = torch.zeros(len(index), dtype=torch.float64)
        run_step(sampler.step(state, draws), answer)
        found = torch.autograd.grad(draws.total.sum(), sampler.leaves[-1], allow_unused=True)
        slopes.append([torch.zeros(len(index)) if slope is None else slope for slope in found])
    x, free = state.x.unflatten(0, (len(prompts.x), texts)), ~prompts.frozen
    own, other = agreement(x, x, free), agreement(x, targets, free)
    crowd = (own.sum(-1) - own.diagonal(dim1=1, dim2=2)) / (texts - 1)
    cost = 2 * (crowd - other.mean(-1))  # of each text; how much the others' mean exceeds it is what it is worth
    worth = ((cost - (cost.sum(-1, keepdim=True) - cost) / (texts - 1)) / (cost.std() + 1e-9)).flatten()
    pull = torch.zeros(4, len(slopes), dtype=torch.float64)
    for i, step in enumerate(slopes):
        pull[:, i] = torch.stack([(worth * slope).nan_to_num(0).mean() for slope in step])
    at_times = torch.zeros_like(times)
    at_times[:-1] += pull[0]
    at_times[1:] += pull[1]
    (numbers.lengths.grad,) = torch.autograd.grad(times, numbers.lengths, at_times)
    numbers.log_temperatures.grad = pull[2] * numbers.log_temperatures.detach().exp()
    numbers.shares.grad = pull[3]
