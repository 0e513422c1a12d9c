"""Our Euler sampler and that of flow_matching on one posterior: the same law, time and memory of a step.

flow_matching 1.0.10 (arXiv 2412.06264) is CC BY-NC: it is run from a folder of its own, for this comparison only. Both
draw x1 from the posterior, then jump there with probability 1 - exp(-h dkappa/(1 - kappa)), on the same grid; theirs
draws in float32, its default, ours in float64.

    pip install --no-deps --target FOLDER flow_matching==1.0.10 torchdiffeq
"""

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

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
from eval.bench.memory import process_memory, start_counting

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


@dataclass
class Table:
    """The exact posterior network of a random law over all texts of ``length`` tokens 0 .. ``tokens`` - 1."""

    source: Source
    length: int
    tokens: int

    def __post_init__(self):
        self.path = MixturePath(self.source, PowerScheduler())
        self.texts = torch.tensor(list(itertools.product(range(self.tokens), repeat=self.length)))
        self.states = torch.tensor(list(itertools.product(range(self.source.vocab_size), repeat=self.length)))
        weights = torch.rand(len(self.texts), generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
        self.data = weights / weights.sum()

    def index(self, x: Tensor) -> Tensor:
        """The numbers of the states x [B, L]."""
        return x @ self.source.vocab_size ** torch.arange(self.length - 1, -1, -1)

    def __call__(self, x: Tensor, t: Tensor, frozen: Tensor | None) -> Tensor:
        """log p_1t [B, L, V]; all sequences are at one time."""
        time = t[:1].double().expand(len(self.texts))
        reach = self.path.marginal(self.texts, time)  # [texts, L, V]
        joint = self.data * torch.stack([reach[:, i, self.states[:, i]] for i in range(self.length)]).prod(0).T
        joint = joint / joint.sum(-1, keepdim=True).clamp_min(1e-300)  # [states, texts]
        tokens = torch.nn.functional.one_hot(self.texts, self.source.vocab_size).double()
        return torch.einsum("st,tlv->slv", joint, tokens)[self.index(x)].log().float()


def compare_laws(peer: Peer, name: str, steps: int = 8, count: int = 20000) -> dict[str, Any]:
    """Total variation between ``count`` texts of each, on a table of 9 texts, and between two runs of ours."""
    tokens = 3
    source = make_source(name, tokens + (name == "mask"))
    table = Table(source, 2, tokens)

    def law(run, seed: int) -> Tensor:
        out = run(table, source, start_text(source, count, 2, seed), steps, seed)
        return torch.bincount(table.index(out), minlength=len(table.states)) / count

    ours, again, theirs = law(run_ours, 1), law(run_ours, 2), law(peer.run, 3)
    return {
        "source": name,
        "steps": steps,
        "texts": count,
        "total_variation": round((ours - theirs).abs().sum().item() / 2, 4),
        "total_variation_of_two_runs_of_ours": round((ours - again).abs().sum().item() / 2, 4),
    }


def fixed_network(vocab_size: int, batch: int, length: int, source: Source) -> Network:
    """Logits that cost nothing: always the same ones, so that the sampler alone is measured."""
    logits = torch.randn(batch, length, vocab_size, generator=torch.Generator().manual_seed(0))
    if source.mask_id is not None:
        logits[..., source.mask_id] = -torch.inf
    return lambda x, t, frozen: logits


def compare_times(
    peer: Peer, name: str, vocab_size: int, batch: int, length: int, steps: int, rounds: int, advance=lambda: None
) -> dict[str, Any]:
    """Median seconds of a step, ours and theirs in turn, and their ratio."""
    source = make_source(name, vocab_size)
    network = fixed_network(vocab_size, batch, length, source)
    x, seconds = start_text(source, batch, length), {"ours": [], "theirs": []}
    for i in range(rounds):
        for who, run in (("ours", run_ours), ("theirs", peer.run)):
            started = time.perf_counter()
            run(network, source, x, steps, i)
            seconds[who].append((time.perf_counter() - started) / steps)
            advance()
    ours, theirs = (median(seconds[who]) for who in ("ours", "theirs"))
    return {
        "ours_ms_per_step": round(1000 * ours, 3),
        "theirs_ms_per_step": round(1000 * theirs, 3),
        "time_ratio": round(ours / theirs, 4),
    }


def compare_memory(folder: Path, name: str, vocab_size: int, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Peak bytes above the idle process, which holds libraries and logits; each in a process of its own."""
    settings = [str(folder), name, *map(str, (vocab_size, batch, length, steps))]
    peaks = {}
    for who in ("ours", "theirs"):
        command = [sys.executable, "-m", "eval.bench.flow_peer", who, *settings]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[who] = json.loads(run.stdout.splitlines()[-1])
    return {
        "ours_peak_mib": round(peaks["ours"] / 2**20, 1),
        "theirs_peak_mib": round(peaks["theirs"] / 2**20, 1),
        "memory_ratio": round(peaks["ours"] / peaks["theirs"], 4),
    }


def measure_peer(
    folder: Path, vocab_sizes: tuple[int, ...], batch: int, length: int, steps: int, rounds: int, advance=lambda: None
) -> Iterator[dict[str, Any]]:
    """Rows: the law for each source, then time and memory for each source and vocabulary.

    ``advance`` is called after each of 2 * rounds * 2 * len(vocab_sizes) timed runs.
    """
    peer = Peer(folder)
    for name in ("mask", "uniform"):
        yield compare_laws(peer, name)
    for vocab_size, name in itertools.product(vocab_sizes, ("mask", "uniform")):
        row = {"source": name, "vocab_size": vocab_size, "batch_size": batch, "length": length, "steps": steps}
        row |= compare_times(peer, name, vocab_size, batch, length, steps, rounds, advance)
        yield row | compare_memory(folder, name, vocab_size, batch, length, steps)


def _peak_of_one_run(who: str, folder: str, name: str, vocab_size: int, batch: int, length: int, steps: int) -> int:
    run = run_ours if who == "ours" else Peer(Path(folder)).run
    small = make_source(name, 64)
    run(fixed_network(64, batch, length, small), small, start_text(small, batch, length), steps)
    source = make_source(name, vocab_size)
    network, x = fixed_network(vocab_size, batch, length, source), start_text(source, batch, length)
    idle = start_counting("cpu")
    run(network, source, x, steps)
    return process_memory("VmHWM") - idle


if __name__ == "__main__":
    print(json.dumps(_peak_of_one_run(*sys.argv[1:4], *map(int, sys.argv[4:]))))
