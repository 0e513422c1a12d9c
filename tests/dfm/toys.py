"""Toys whose every distribution can be written down: a data distribution over all texts, its exact posterior, exact
transitions.

Shapes: L positions, V vocabulary, S = V^L states. Everything in float64.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dfm.draws import Draws
from dfm.paths.path import Path
from dfm.sampling.grid import finish
from dfm.sampling.loop import run_step
from dfm.sampling.state import FlowState


def dirichlet(count: int, seed: int = 0, concentration: float = 1.0) -> Tensor:
    """A random distribution of ``count`` outcomes."""
    return torch.tensor(np.random.default_rng(seed).dirichlet(concentration * np.ones(count)))


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def total_variation(p: Tensor, q: Tensor) -> float:
    return (p - q).abs().sum().item() / 2


class Toy:
    """Data distribution over texts of ``length`` tokens 0 .. ``tokens`` - 1 on a path, and the exact posterior network of it.

    states: [S, L] all texts of the vocabulary, mask included. data: [S] probabilities of the clean ones.
    """

    def __init__(self, path: Path, length: int, tokens: int, seed: int = 0, concentration: float = 1.0):
        self.path, self.length, self.tokens, self.vocab_size = path, length, tokens, path.source.vocab_size
        self.states = torch.tensor(list(itertools.product(range(self.vocab_size), repeat=length)))
        clean = (self.states < tokens).all(-1)
        self.data = torch.zeros(len(self.states), dtype=torch.float64)
        self.data[clean] = dirichlet(tokens**length, seed, concentration)

    def _given(self, t: Tensor, distribution) -> Tensor:
        """distribution(x1, t) of every token of a text, [S (x1), L, V]."""
        return distribution(self.states, t.expand(len(self.states)))

    def reach(self, t: Tensor) -> Tensor:
        """[S (x1), S (z)]: p_t(z | x1)."""
        return self._pick(self._given(t, self.path.marginal)).prod(-1)

    def marginal(self, t: Tensor) -> Tensor:
        """p_t [S]; t a scalar."""
        return self.data @ self.reach(t)

    def dmarginal(self, t: Tensor) -> Tensor:
        """d p_t / dt [S], by the product rule."""
        p = self._pick(self._given(t, self.path.marginal))
        dp = self._pick(self._given(t, self.path.dmarginal))
        parts = [dp[..., i] * p[..., [j for j in range(self.length) if j != i]].prod(-1) for i in range(self.length)]
        return self.data @ sum(parts)

    def _pick(self, distributions: Tensor) -> Tensor:
        """[S, L, V] distributions of texts -> [S, S, L] probability of token i of every state."""
        return torch.stack([distributions[:, i, self.states[:, i]] for i in range(self.length)], dim=-1)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """p_1t [B, L, V] for texts x [B, L] at times t [B]; uniform where a text cannot be reached."""
        count = len(self.states)
        every_x1, every_t = self.states.repeat(len(x), 1), t.repeat_interleave(count)
        distributions = self.path.marginal(every_x1, every_t).reshape(len(x), count, self.length, self.vocab_size)
        reach = distributions.gather(-1, x[:, None, :, None].expand(-1, count, -1, 1)).squeeze(-1).prod(-1)
        weight = self.data * reach
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, self.data)
        weight = weight / weight.sum(-1, keepdim=True)
        return torch.einsum("bs,slv->blv", weight, one_hot(self.states, self.vocab_size).double())

    def __call__(self, x: Tensor, t: Tensor, frozen: Tensor) -> Tensor:
        return self.posterior(x, t).log()

    def everywhere(self, t: float) -> FlowState:
        """A batch of all states at time t."""
        count, mask_id = len(self.states), self.path.source.mask_id
        masked = torch.zeros_like(self.states, dtype=torch.bool) if mask_id is None else self.states == mask_id
        nothing = torch.zeros_like(self.states, dtype=torch.bool)
        done = nothing[:, 0].clone()
        evaluations = torch.zeros(count, dtype=torch.long)
        ones = torch.ones(self.states.shape, dtype=torch.float64)
        return FlowState(self.states.clone(), masked, nothing, times(t).repeat(count), done, evaluations, ones)

    def reachable(self, p1: Tensor, state: FlowState) -> Tensor:
        """With a mask source, carry-over: revealed tokens stay."""
        stays = one_hot(state.x, self.vocab_size).double()
        keep = torch.zeros_like(state.masked) if self.path.source.mask_id is None else ~state.masked
        return torch.where(keep[..., None], stays, p1)

    def transition(self, distribution: Tensor) -> Tensor:
        """[S, S'] from distributions [S, L, V]: the product over positions."""
        return self._pick(distribution).prod(-1)

    def push(self, start: Tensor, sampler, t: float, s: float) -> Tensor:
        """The distribution [S] of the text after one step of a DistributionSampler from the distribution ``start``
        [S], exactly.
        """
        state = self.everywhere(t)
        p1, later = self.reachable(self.posterior(state.x, state.t), state), times(s).repeat(len(self.states))
        return start @ self.transition(finish(sampler.distribution(state, p1, later), p1, later))

    def run(self, sampler) -> Tensor:
        """The distribution [S] of the text after the whole grid of a DistributionSampler."""
        distribution = self.marginal(times(0.0)[0])
        for t, s in itertools.pairwise(sampler.grid):
            distribution = self.push(distribution, sampler, t, s)
        return distribution

    def index(self, x: Tensor) -> Tensor:
        """Which states the texts x [B, L] are."""
        return x @ torch.tensor([self.vocab_size**i for i in reversed(range(self.length))])

    def enumerate(self, sampler, start: FlowState, to_end: bool = True) -> Tensor:
        """The distribution [S] that ``sampler`` makes of a state of one sequence, by running every branch of its draws."""

        def run(draws: Draws) -> int:
            state = FlowState(**{name: value.clone() for name, value in vars(start).items()})
            while True:
                run_step(sampler.step(state, draws), lambda query: self._answer(query, state))
                if not to_end or state.done.all():
                    return int(self.index(state.x)[0])

        distribution = torch.zeros(len(self.states), dtype=torch.float64)
        for text, probability in branches(run):
            distribution[text] += probability
        return distribution

    def _answer(self, query, state: FlowState) -> Tensor:
        state.evaluations += ~state.done
        p1 = self.posterior(query.x, query.t)
        p1 = self.reachable(p1, FlowState(**{**vars(state), "x": query.x, "masked": query.masked}))
        return p1 if query.only is None else p1[query.only]


class _Branch(Exception):
    def __init__(self, options: list[int]):
        self.options = options


class _ScriptedDraws(Draws):
    """Takes the choices of a script and raises _Branch where it ends; uniform numbers are 1/2."""

    def __init__(self, script: tuple[int, ...]):
        self.script, self.probability = list(script), 1.0

    def categorical(self, distribution: Tensor, where: Tensor) -> Tensor:
        tokens = torch.zeros(where.shape, dtype=torch.long)
        for b, i in where.nonzero().tolist():
            p = distribution[b, i].double().clamp_min(0)
            if not self.script:
                raise _Branch((p > 1e-14).nonzero()[:, 0].tolist())
            token = self.script.pop(0)
            self.probability *= (p[token] / p.sum()).item()
            tokens[b, i] = token
        return tokens

    def rows(self, distribution: Tensor, where: Tensor) -> Tensor:
        spread = torch.zeros(*where.shape, distribution.shape[-1], dtype=distribution.dtype)
        spread[where] = distribution
        return self.categorical(spread, where)

    def happens(self, probability: Tensor, where: Tensor) -> Tensor:
        odds = torch.stack([1 - probability, probability], -1)[:, None].expand(*where.shape, 2)
        return self.categorical(odds, where) == 1

    def uniform(self, where: Tensor) -> Tensor:
        return where.double() / 2


def branches(run):
    """All (result of ``run(draws)``, probability), over everything that can be drawn."""
    scripts = [()]
    while scripts:
        script = scripts.pop()
        draws = _ScriptedDraws(script)
        try:
            result = run(draws)
        except _Branch as branch:
            scripts.extend((*script, option) for option in branch.options)
        else:
            yield result, draws.probability


def entropy(distribution: Tensor) -> float:
    return -sum(p * math.log(p) for p in distribution.flatten().tolist() if p > 0)
