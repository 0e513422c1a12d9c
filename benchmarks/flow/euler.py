"""The Euler sampler of flow_matching and ours, each on any posterior network.

flow_matching 1.0.10 (arXiv 2412.06264) is CC BY-NC: it is run from a folder of its own, for a comparison only. Both
draw x1 from the posterior, then jump there with probability 1 - exp(-h dkappa/(1 - kappa)), on the same grid; theirs
draws in float32, its default, ours in float64.

    pip install --no-deps --target FOLDER flow_matching==1.0.10 torchdiffeq
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dfm.draws import Draws
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import MaskSource, Source, UniformSource
from dfm.rates.velocities import ForwardVelocity
from dfm.samplers.rates import EulerX1
from dfm.sampling.grid import time_grid
from dfm.sampling.loop import Posterior, sample

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
VERSION = "1.0.10"


def make_source(name: str, vocab_size: int) -> Source:
    """The source called ``name``: "mask", whose token is the last id, or "uniform"."""
    return MaskSource(vocab_size, vocab_size - 1) if name == "mask" else UniformSource(vocab_size)


def start_text(source: Source, batch: int, length: int, seed: int = 0) -> Tensor:
    """Noise [batch, length]."""
    return source.sample(
        torch.zeros(batch, length, dtype=torch.long), Draws([torch.Generator().manual_seed(seed)] * batch)
    )


def run_ours(network: Network, source: Source, x: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Tokens [B, L] from the noise ``x``."""
    path = MixturePath(source, PowerScheduler())
    sampler = EulerX1(path, time_grid(steps), ForwardVelocity(path))
    draws = Draws([torch.Generator().manual_seed(seed)] * len(x))
    return sample(Posterior(network, source), sampler, x, torch.zeros_like(x, dtype=torch.bool), draws).tokens


class Peer:
    """flow_matching in ``folder``; ValueError if it is not there."""

    def __init__(self, folder: Path):
        if not (folder / "flow_matching").is_dir():
            raise ValueError(
                f"flow_matching is not installed in {str(folder)!r}; run "
                f"pip install --no-deps --target {folder} flow_matching=={VERSION} torchdiffeq"
            )
        sys.path.append(str(folder))
        try:
            from flow_matching.path import MixtureDiscreteProbPath
            from flow_matching.path.scheduler import PolynomialConvexScheduler
            from flow_matching.solver import MixtureDiscreteEulerSolver
            from flow_matching.utils import ModelWrapper
        finally:
            sys.path.remove(str(folder))

        class Wrapped(ModelWrapper):
            """A network as they want it: probabilities."""

            def forward(self, x, t, **extras):
                return self.model(x, t, None).softmax(-1)

        self._wrap, self._solver = Wrapped, MixtureDiscreteEulerSolver
        self._path = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0))

    def run(self, network: Network, source: Source, x: Tensor, steps: int, seed: int = 0) -> Tensor:
        """Tokens [B, L] from the noise ``x``."""
        torch.manual_seed(seed)
        solver = self._solver(self._wrap(network), self._path, source.vocab_size)
        grid = torch.tensor(time_grid(steps), dtype=torch.float32)
        return solver.sample(x, step_size=None, time_grid=grid)


def fixed_network(vocab_size: int, batch: int, length: int, source: Source) -> Network:
    """Logits that cost nothing: always the same ones, so that the sampler alone is measured."""
    logits = torch.randn(batch, length, vocab_size, generator=torch.Generator().manual_seed(0))
    if source.mask_id is not None:
        logits[..., source.mask_id] = -torch.inf
    return lambda x, t, frozen: logits
