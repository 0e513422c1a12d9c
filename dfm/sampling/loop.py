"""The common loop: run a sampler's steps on a network until every sequence is done."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.inputs.checks import check_range
from dfm.draws import Draws
from dfm.paths.sources import Source
from dfm.rates.guidance import guide_logits
from dfm.rates.posterior import PosteriorModel, posterior_distribution
from dfm.sampling.state import FlowState, Query, Sampler, Step


@dataclass(frozen=True)
class FlowSample:
    """tokens: [B, L]. evaluations: [B], network evaluations of each sequence.

    trajectory: (times [B], tokens [B, L]) before the first and after every step, where asked for, else empty.
    """

    tokens: Tensor
    evaluations: Tensor
    trajectory: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Posterior:
    """Answers the queries of samplers with p_1t: network, guidance, then temperature and top_p.

    unconditional: the network without the condition, for guidance. guidance_weight: w of the guided logits; with 0 the
    second network is not run. temperature, top_p: sharpen p_1t, see :func:`dfm.rates.posterior.sharpen`.
    """

    model: PosteriorModel
    source: Source
    unconditional: PosteriorModel | None = None
    guidance_weight: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        check_range("guidance_weight", self.guidance_weight, 0)
        check_range("temperature", self.temperature, 0)
        check_range("top_p", self.top_p, 0, 1, include_low=False)
        if self.guidance_weight and self.unconditional is None:
            raise ValueError("unconditional must be a network if guidance_weight is above 0, got None")

    def answer(self, query: Query, state: FlowState) -> Tensor:
        """p_1t [B, L, V], or [N, V] of the positions that are asked for alone; counts the evaluations."""
        frozen = ~state.free
        if not query.conditional and self.unconditional is None:
            raise ValueError("unconditional must be a network for a sampler with guidance, got None")
        model = self.model if query.conditional else self.unconditional
        step = {} if query.until is None else {"until": query.until, "noise": query.noise}
        logits = model(query.x, query.t, frozen, **step)
        state.evaluations = state.evaluations + ~state.done
        if query.conditional and self.guidance_weight:
            other = self.unconditional(query.x, query.t, frozen)
            state.evaluations = state.evaluations + ~state.done
            logits = guide_logits(logits, other, self.guidance_weight)
        x, masked = query.x, query.masked
        if query.only is not None:
            logits, x, masked = logits[query.only], x[query.only], masked[query.only]
        return posterior_distribution(
            logits,
            x,
            masked,
            self.source.mask_id,
            carry_over=query.carry_over,
            temperature=self.temperature,
            top_p=self.top_p,
        )


def run_step(step: Step, answer: Callable[[Query], Tensor]) -> None:
    """Run one step to its end, answering every query."""
    try:
        query = next(step)
        while True:
            query = step.send(answer(query))
    except StopIteration:
        return


@torch.no_grad()
def sample(
    posterior: Posterior, sampler: Sampler, x: Tensor, frozen: Tensor, draws: Draws, *, keep_trajectory: bool = False
) -> FlowSample:
    """Fill the positions of ``x`` [B, L] that are not ``frozen`` [B, L] bool; ``draws`` has a generator per sequence.

    >>> from dfm import MaskSource, MixturePath, time_grid
    >>> from dfm.paths.schedulers import PowerScheduler
    >>> from dfm.samplers import ExactX1
    >>> source = MaskSource(vocab_size=3, mask_id=2)
    >>> path = MixturePath(source, PowerScheduler())
    >>> likes_zero = lambda x, t, frozen: torch.tensor([50.0, 0.0, 0.0]).expand(*x.shape, -1)
    >>> x, frozen = torch.tensor([[1, 1, 1]]), torch.tensor([[True, False, False]])
    >>> out = sample(Posterior(likes_zero, source), ExactX1(path, time_grid(4)), x, frozen, Draws.seeded(0))
    >>> out.tokens.tolist(), out.evaluations.tolist()
    ([[1, 0, 0]], [4])
    """
    if len(draws.generators) != len(x):
        raise ValueError(f"draws must have {len(x)} generators, one for each sequence, got {len(draws.generators)}")
    state = FlowState.start(x, frozen, posterior.source, draws)
    trajectory = [(state.t, state.x)] if keep_trajectory else []
    while not state.done.all():
        run_step(sampler.step(state, draws), lambda query: posterior.answer(query, state))
        if keep_trajectory:
            trajectory.append((state.t, state.x))
    return FlowSample(state.x, state.evaluations, tuple(trajectory))
