"""Our Euler sampler and that of flow_matching on one posterior: the same distribution, time and memory of a step.

python -m benchmarks.flow.peer --folder FOLDER
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from benchmarks.flow.euler import VERSION, Peer, fixed_network, make_source, run_ours, start_text
from benchmarks.flow.peer_memory import compare_memory
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.paths.sources import Source
from eval.bench.results import progress
from eval.devices import clock


def peer(
    folder: Annotated[
        Path, typer.Option(help=f"Where flow_matching {VERSION} and torchdiffeq are installed by pip --target.")
    ],
    vocab_size: Annotated[
        list[int] | None, typer.Option(min=2, help="Repeatable; 32,768 and 131,072 by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 128,
    steps: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turn; medians are reported.")] = 3,
    out: Out = OUT,
    name: Name = "flow-peer",
    overwrite: Overwrite = False,
) -> None:
    """The Euler sampler of flow_matching and ours on one posterior: the same distribution, our time and memory over theirs."""
    sizes = tuple(vocab_size or (32768, 131072))
    settings = {"rounds": rounds, "peer": f"flow_matching {VERSION}", "dtype": "float32"}
    with (
        results_in(out, name, overwrite) as results,
        progress(title="runs", total=4 * rounds * len(sizes)) as advance,
    ):
        results.describe(**settings)
        for row in measure_peer(folder, sizes, batch_size, length, steps, rounds, advance):
            results.take(row)


@dataclass
class Table:
    """The exact posterior network of a random distribution over all texts of ``length`` tokens 0 .. ``tokens`` - 1."""

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


def compare_distributions(peer: Peer, name: str, steps: int = 8, count: int = 20000) -> dict[str, Any]:
    """Total variation between ``count`` texts of each, on a table of 9 texts, and between two runs of ours."""
    tokens = 3
    source = make_source(name, tokens + (name == "mask"))
    table = Table(source, 2, tokens)

    def distribution(run, seed: int) -> Tensor:
        out = run(table, source, start_text(source, count, 2, seed), steps, seed)
        return torch.bincount(table.index(out), minlength=len(table.states)) / count

    ours, again, theirs = distribution(run_ours, 1), distribution(run_ours, 2), distribution(peer.run, 3)
    return {
        "source": name,
        "steps": steps,
        "texts": count,
        "total_variation": round((ours - theirs).abs().sum().item() / 2, 4),
        "total_variation_of_two_runs_of_ours": round((ours - again).abs().sum().item() / 2, 4),
    }


def compare_times(
    peer: Peer, name: str, vocab_size: int, batch: int, length: int, steps: int, rounds: int, advance=lambda: None
) -> dict[str, Any]:
    """Median seconds of a step, ours and theirs in turn, and their ratio."""
    source = make_source(name, vocab_size)
    network = fixed_network(vocab_size, batch, length, source)
    x, seconds = start_text(source, batch, length), {"ours": [], "theirs": []}
    for i in range(rounds):
        for who, run in (("ours", run_ours), ("theirs", peer.run)):
            started = clock(x.device)
            run(network, source, x, steps, i)
            seconds[who].append((clock(x.device) - started) / steps)
            advance()
    ours, theirs = (median(seconds[who]) for who in ("ours", "theirs"))
    return {
        "ours_ms_per_step": round(1000 * ours, 3),
        "theirs_ms_per_step": round(1000 * theirs, 3),
        "time_ratio": round(ours / theirs, 4),
    }


def measure_peer(
    folder: Path, vocab_sizes: tuple[int, ...], batch: int, length: int, steps: int, rounds: int, advance=lambda: None
) -> Iterator[dict[str, Any]]:
    """Rows: the distribution for each source, then time and memory for each source and vocabulary.

    ``advance`` is called after each of 2 * rounds * 2 * len(vocab_sizes) timed runs.
    """
    peer = Peer(folder)
    for name in ("mask", "uniform"):
        yield compare_distributions(peer, name)
    for vocab_size, name in itertools.product(vocab_sizes, ("mask", "uniform")):
        row = {"source": name, "vocab_size": vocab_size, "batch_size": batch, "length": length, "steps": steps}
        row |= compare_times(peer, name, vocab_size, batch, length, steps, rounds, advance)
        yield row | compare_memory(folder, name, vocab_size, batch, length, steps)


if __name__ == "__main__":
    sys.exit(main(peer, "flow.peer"))
