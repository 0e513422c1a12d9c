"""Samplers: one small file each, one common loop (``sample``), one interface (``Sampler.step`` on a ``FlowState``).

| Sampler | Source | Evaluations | Exact in the limit of |
|---|---|---|---|
| Euler, EulerX1, TauLeap, GuidedEuler | any | one a step (guided: two) | short steps |
| ThetaTrapezoidal | any | two a step | short steps, at second order |
| MetricX1 | uniform, metric path | one a step | short steps |
| ExactX1, D3PM, Psi | any | one a step | short steps; a single position always |
| Corrector, Adaptive, Corrected | any | one a step, and the passes | short steps |
| ReMDM | mask | one a step | short steps and sigma |
| FirstHitting | mask | one a token | always |
| Uniformisation | not mask | about L ln(1/rest) | rest -> 0 |
| ScheduledTopK, RuleSampler, P2 | mask | as chosen | one token a step, for the first two |
| CanvasRule | not mask | as chosen | never |
| LooGibbs (in Corrected) | not mask | one a pass | many passes over one random site |
"""

from dfm.samplers.adaptive import Adaptive
from dfm.samplers.canvas_rule import CanvasRule
from dfm.samplers.corrector import Corrected, Corrector, FrozenPass
from dfm.samplers.d3pm import D3PM
from dfm.samplers.euler import Euler
from dfm.samplers.euler_x1 import EulerX1
from dfm.samplers.exact_x1 import ExactX1
from dfm.samplers.first_hitting import FirstHitting
from dfm.samplers.grid import time_grid
from dfm.samplers.guided import GuidedEuler
from dfm.samplers.loo_gibbs import LooGibbs
from dfm.samplers.loop import FlowSample, Posterior, run_step, sample
from dfm.samplers.metric_x1 import MetricX1
from dfm.samplers.p2 import P2
from dfm.samplers.psi import Psi
from dfm.samplers.remdm import ReMDM
from dfm.samplers.reveal import RuleSampler
from dfm.samplers.state import FlowState, Query, Sampler
from dfm.samplers.tau_leap import TauLeap
from dfm.samplers.theta_trapezoidal import ThetaTrapezoidal
from dfm.samplers.topk import ScheduledTopK
from dfm.samplers.uniformisation import Uniformisation

__all__ = [
    "D3PM",
    "P2",
    "Adaptive",
    "CanvasRule",
    "Corrected",
    "Corrector",
    "Euler",
    "EulerX1",
    "ExactX1",
    "FirstHitting",
    "FlowSample",
    "FlowState",
    "FrozenPass",
    "GuidedEuler",
    "LooGibbs",
    "MetricX1",
    "Posterior",
    "Psi",
    "Query",
    "ReMDM",
    "RuleSampler",
    "Sampler",
    "ScheduledTopK",
    "TauLeap",
    "ThetaTrapezoidal",
    "Uniformisation",
    "run_step",
    "sample",
    "time_grid",
]
