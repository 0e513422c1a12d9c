"""Gibbs passes at a frozen time with the leave-one-out posterior (arXiv 2605.22765)."""

from dataclasses import dataclass
from typing import Literal

import torch

from decoding.checks import check_choice, check_count
from dfm.draws import Draws
from dfm.paths import MixturePath
from dfm.posterior import leave_one_out
from dfm.samplers.state import FlowState, Query, Step
from dfm.samplers.topk import best
from dfm.sources import check_mask


@dataclass(frozen=True)
class LooGibbs:
    """Draw a site again from k g + (1 - k) p, where g is the law of its x1 given the other sites; the time stays.

    With one random site a pass leaves p_t invariant. Heuristics: several ``sites`` at once, which are drawn as if they
    were independent; choose = "least_confident", the sites whose token is the least likely under that law, which does
    not leave p_t invariant even for one site. Needs kappa < 1, and a source that gives every token in use a positive
    probability. A corrector for :class:`dfm.samplers.corrector.Corrected`.
    """

    path: MixturePath
    sites: int = 1
    choose: Literal["random", "least_confident"] = "random"

    def __post_init__(self):
        check_mask(self.path.source, wanted=False)
        check_count("sites", self.sites)
        check_choice("choose", self.choose, ("random", "least_confident"))

    def step(self, state: FlowState, draws: Draws) -> Step:
        p1 = yield Query(state.x, state.t, state.masked)
        source = self.path.source.probabilities(p1)
        k = self.path.scheduler.shared().kappa(state.t[:, None]).to(p1)
        data_law = leave_one_out(p1.log(), state.x, k, source).softmax(-1)
        law = k[..., None] * data_law + (1 - k[..., None]) * source
        if self.choose == "random":
            chosen = torch.zeros_like(state.free)
            for _ in range(self.sites):
                chosen = chosen | draws.pick(state.free & ~chosen)
        else:
            score = law.gather(-1, state.x[..., None])[..., 0]
            chosen = best(score, state.free, torch.full_like(state.evaluations, self.sites))
        state.write(draws.categorical(law, chosen), chosen)
