"""Discrete flow matching: text from noise in few steps (arXiv 2407.15595).

Time runs from 0 (source) to 1 (data). A *source* says what noise is, a *scheduler* how much of the text is data at time
t, a *path* joins both to a law for the noisy text X_t. A network learns the *posterior* p_1t: the law of each clean
token given X_t. From it a *velocity* (rates of jumping) or a *kernel* (a finite step) moves X_t forward, and a
*sampler* makes a whole text of such steps. FlowDecoder runs samplers on a language model, FlowObjective trains one for
them; all else is pure functions of tensors.

    source = MaskSource(vocab_size, mask_id)
    path = MixturePath(source, CosineScheduler())
    out = sample(Posterior(network, source), ExactX1(path, time_grid(32)), x, frozen, Draws.seeded(0, 1))

Read first: paths.py, velocity.py, kernels.py, samplers/state.py, samplers/grid.py, samplers/loop.py.
"""

from dfm.beta_schedules import BetaSchedule, ConstantSpeedBeta, PowerBeta
from dfm.conditional_velocity import KineticOptimalVelocity, MetricVelocity, ReversalVelocity, UniformWeightVelocity
from dfm.decoder import FlowDecoder
from dfm.draws import BatchDraws, Draws
from dfm.fit import FittedSchedule, fit_schedule, isotonic_decreasing
from dfm.guidance import guide_law, guide_logits, guide_rates
from dfm.infilling import draw_outside_span, draw_prefix, draw_share, keep_given
from dfm.losses import denoising_loss, generalised_kl, rate_bound, stratified_times
from dfm.objective import FlowObjective
from dfm.paths import ConvexSumPath, EmbeddingDistance, MetricPath, MixturePath, Noised, Path
from dfm.posterior import PosteriorModel, leave_one_out, noise_posterior, posterior_law
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
    FlowSample,
    FlowState,
    FrozenPass,
    GuidedEuler,
    LooGibbs,
    MetricX1,
    Posterior,
    Psi,
    Query,
    ReMDM,
    RuleSampler,
    Sampler,
    ScheduledTopK,
    TauLeap,
    ThetaTrapezoidal,
    Uniformisation,
    run_step,
    sample,
    time_grid,
)
from dfm.schedulers import (
    CallableScheduler,
    CosineScheduler,
    CubicScheduler,
    KineticOptimalScheduler,
    PiecewiseLinearScheduler,
    PowerScheduler,
    Scheduler,
)
from dfm.sources import CouplingSource, MaskSource, Source, UniformSource, UnigramSource
from dfm.velocity import (
    BackwardVelocity,
    ConvexVelocity,
    CorrectorSchedule,
    CorrectorVelocity,
    ForwardVelocity,
    Superposition,
    Velocity,
    check_rates,
)

__all__ = [
    "D3PM",
    "P2",
    "Adaptive",
    "BackwardVelocity",
    "BatchDraws",
    "BetaSchedule",
    "CallableScheduler",
    "CanvasRule",
    "ConstantSpeedBeta",
    "ConvexSumPath",
    "ConvexVelocity",
    "Corrected",
    "Corrector",
    "CorrectorSchedule",
    "CorrectorVelocity",
    "CosineScheduler",
    "CouplingSource",
    "CubicScheduler",
    "Draws",
    "EmbeddingDistance",
    "Euler",
    "EulerX1",
    "ExactX1",
    "FirstHitting",
    "FittedSchedule",
    "FlowDecoder",
    "FlowObjective",
    "FlowSample",
    "FlowState",
    "ForwardVelocity",
    "FrozenPass",
    "GuidedEuler",
    "KineticOptimalScheduler",
    "KineticOptimalVelocity",
    "LooGibbs",
    "MaskSource",
    "MetricPath",
    "MetricVelocity",
    "MetricX1",
    "MixturePath",
    "Noised",
    "Path",
    "PiecewiseLinearScheduler",
    "Posterior",
    "PosteriorModel",
    "PowerBeta",
    "PowerScheduler",
    "Psi",
    "Query",
    "ReMDM",
    "ReversalVelocity",
    "RuleSampler",
    "Sampler",
    "ScheduledTopK",
    "Scheduler",
    "Source",
    "Superposition",
    "TauLeap",
    "ThetaTrapezoidal",
    "UniformSource",
    "UniformWeightVelocity",
    "Uniformisation",
    "UnigramSource",
    "Velocity",
    "check_rates",
    "denoising_loss",
    "draw_outside_span",
    "draw_prefix",
    "draw_share",
    "fit_schedule",
    "generalised_kl",
    "guide_law",
    "guide_logits",
    "guide_rates",
    "isotonic_decreasing",
    "keep_given",
    "leave_one_out",
    "noise_posterior",
    "posterior_law",
    "rate_bound",
    "run_step",
    "sample",
    "stratified_times",
    "time_grid",
]
