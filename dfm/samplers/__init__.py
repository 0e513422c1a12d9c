"""The samplers, by kind, and their names. A new one is a class and its place in ``SAMPLERS``, or ``module:Class``.

| Sampler | Source | Evaluations | Exact in the limit of |
|---|---|---|---|
| Euler, EulerX1, TauLeap, GuidedEuler | any | one a step (guided: two) | short steps |
| ThetaTrapezoidal | any | two a step | short steps, at second order |
| MetricX1 | uniform, metric path | one a step | short steps |
| ExactX1, D3PM, Psi | any | one a step | short steps; a single position always |
| Corrector, Adaptive, Corrected | any | one a step, and the passes | short steps |
| ReMDM | mask | one a step | short steps and sigma |
| Glass | mask | one a step, in transitions of some | many inner steps |
| FittedSampler | any | one a step, numbers from a file | short steps |
| Transition | mask | one a step | short steps; few, with a model that was taught them |
| FirstHitting | mask | one a token | always |
| Uniformisation | not mask | about L ln(1/rest) | rest -> 0 |
| ScheduledTopK, RuleSampler, P2 | mask | as chosen | one token a step, for the first two |
| CanvasRule | not mask | as chosen | never |
| LooGibbs (in Corrected) | not mask | one a pass | many passes over one random site |

Shapes as in :mod:`dfm.sampling`.
"""

from decoding.inputs.checks import check_choice, named_object
from dfm.samplers.events import FirstHitting, Uniformisation
from dfm.samplers.glass import Glass
from dfm.samplers.kernels import D3PM, Adaptive, Corrector, ExactX1, Psi, ReMDM
from dfm.samplers.ranked import P2, LooGibbs, ScheduledTopK
from dfm.samplers.rates import Euler, EulerX1, TauLeap, ThetaTrapezoidal
from dfm.samplers.transition import Transition
from dfm.sampling.state import Sampler

KINDS: tuple[type[Sampler], ...] = (
    ExactX1,
    Euler,
    EulerX1,
    TauLeap,
    ThetaTrapezoidal,
    D3PM,
    Psi,
    Corrector,
    Adaptive,
    ReMDM,
    Glass,
    ScheduledTopK,
    P2,
    FirstHitting,
    LooGibbs,
    Uniformisation,
    Transition,
)
SAMPLERS = {kind.name: kind for kind in KINDS}


def find_sampler(sampler: str | type[Sampler], source: str) -> type[Sampler]:
    """The sampler of that name, the class ``module:Class``, or the class itself, for a kind of source.

    Raises ValueError if there is none, or none for that source.

    >>> find_sampler("exact", "mask").__name__
    'ExactX1'
    """
    if isinstance(sampler, str) and ":" not in sampler:
        known = [name for name, kind in SAMPLERS.items() if source in kind.sources]
        check_choice(f"sampler (for path {source!r})", sampler, [*known, "rule"])
        return SAMPLERS[sampler]
    kind = named_object("sampler", sampler) if isinstance(sampler, str) else sampler
    if not (isinstance(kind, type) and issubclass(kind, Sampler)):
        raise ValueError(f"sampler must be a subclass of dfm.Sampler, got {sampler!r}")
    if source not in kind.sources:
        known = " and ".join(map(repr, kind.sources)) or "no path by itself"
        raise ValueError(f"sampler must be one for path {source!r}; {kind.__name__} is for {known}")
    return kind
