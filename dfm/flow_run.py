"""What the settings of a flow decoder come to on one model: how it was trained, the path, and the sampler."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dfm.draws import Draws, LikeliestDraws
from dfm.flow_config import FlowTraits
from dfm.paths.mixture import MixturePath
from dfm.sampling.state import Sampler


@dataclass(frozen=True)
class FlowRun:
    """Made once for a run: nothing is looked up or built again for a sequence or a step.

    traits: how the model was trained. path: from its source to text. make_sampler: the sampler for a number of tokens to
    decide. keeps: tokens that the sampler has revealed are final. takes_levels: the model is told how noisy its input is.
    """

    traits: FlowTraits
    path: MixturePath
    make_sampler: Callable[[int], Sampler]
    keeps: bool
    takes_levels: bool


def make_draws(sampler: Sampler, generators: Sequence[torch.Generator], greedy: bool) -> Draws:
    """The random numbers of sequences that ``sampler`` works on.

    ``greedy`` distributions are those of the likeliest token. A sampler that ranks positions needs their
    distributions as they are: then it is the draws that take the likeliest token.
    """
    return LikeliestDraws(generators) if greedy and sampler.ranks_positions else Draws(generators)
