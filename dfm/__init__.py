"""Discrete flow matching: text from noise in few steps (arXiv 2407.15595).

Time runs from 0 (source) to 1 (data). A *source* says what noise is, a *scheduler* how much of the text is data at time
t, a *path* joins both to a distribution for the noisy text X_t (``dfm.paths``). A network learns the *posterior*
p_1t: the distribution of each clean token given X_t. From it a *velocity* (rates of jumping) or a *kernel* (a finite
step) moves X_t forward (``dfm.rates``), and a *sampler* makes a whole text of such steps (``dfm.sampling``,
``dfm.samplers``). FlowDecoder runs samplers on a language model, FlowObjective trains one for them and
TransitionObjective teaches it to need few steps; all else is pure functions of tensors.

    source = MaskSource(vocab_size, mask_id)
    path = MixturePath(source, CosineScheduler())
    out = sample(Posterior(network, source), ExactX1(path, time_grid(32)), x, frozen, Draws.seeded(0, 1))

Read first: paths/mixture.py, rates/velocities.py, rates/kernels.py, sampling/state.py, sampling/grid.py, samplers/.
"""

from decoding import Decoder  # noqa: F401 - a file of this name that is not ours is named by the error
from dfm.decoder import FlowDecoder
from dfm.draws import Draws
from dfm.objective import FlowObjective
from dfm.paths.mixture import MixturePath
from dfm.paths.sources import MaskSource, UniformSource
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, sample
from dfm.sampling.state import FlowState, Query, Sampler
from dfm.transition import TransitionObjective

__all__ = [
    "Draws",
    "FlowDecoder",
    "FlowObjective",
    "FlowState",
    "MaskSource",
    "MixturePath",
    "Posterior",
    "Query",
    "Sampler",
    "TransitionObjective",
    "UniformSource",
    "sample",
    "time_grid",
]
