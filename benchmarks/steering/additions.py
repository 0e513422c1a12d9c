"""Worked additions steered by a checker: of answers or of lines, against best-of-N and plain sampling at equal forwards.

python -m benchmarks.steering.additions
"""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from benchmarks.figures import plot_curves
from benchmarks.steering.checkers import right_answer, right_lines
from benchmarks.steering.runs import Runs, run
from decoding import decoder_from_spec
from eval.bench.prompts import worked_additions
from setflow.loading import load_model
from steering import SteeredDecoder

PARTICLES = (1, 2, 4, 8, 16)
BEST = "checker of answers (best of N)"


def additions(
    decoder: Annotated[str, typer.Option(metavar="SPEC")] = "sbd:block_size=8,entropy_bound=0.1",
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    particles: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated; 1 to 16 by default.")] = None,
    every: Annotated[int, typer.Option(min=1, help="New tokens between two judgements.")] = 16,
    threshold: Annotated[float, typer.Option(help="Share of N below which the effective size is resampled.")] = 0.9,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Out = OUT,
    name: Name = "steering-additions",
    overwrite: Overwrite = False,
) -> None:
    """Exact match at temperature 1 with a checker of answers and one of lines, for each number of particles.

    "sequence_forwards" counts a forward once for each particle that it runs, so that it is what as many plain samples cost.
    A checker of answers resamples nothing: its particles are plain samples, of which a right one is chosen if there is any,
    as best-of-N does. The most are drawn once, and fewer are the first of them. Without a checker: one of N plain samples,
    or the commonest answer.
    """
    sizes = sorted(particles or PARTICLES)
    with results_in(out, name, overwrite) as results:
        model, tokenizer = load_model(None, torch.float32)
        results.describe(model, count=count, every=every, threshold=threshold, seeds=seeds, temperature=1.0)
        prompts, inner = worked_additions(tokenizer, count), decoder_from_spec(decoder)

        def runs_of(reward, n: int) -> list[Runs]:
            steered = SteeredDecoder(inner, reward, n, every=every, ess_threshold=threshold)
            return [run(model, tokenizer, prompts, steered, 1.0, seed) for seed in range(seeds)]

        answers = runs_of(right_answer, sizes[-1])
        for n in sizes:
            cost = float(np.mean([one.figures()["sequence_forwards"] for one in answers])) * n / sizes[-1]
            for method, share in (("plain", Runs.plain), ("majority", Runs.majority), (BEST, Runs.best_of)):
                results.take(_row(decoder, method, n, [share(one, n) for one in answers], cost))
            lines = runs_of(right_lines, n)
            figures = [one.figures() for one in lines]
            means = {key: round(float(np.mean([f[key] for f in figures])), 4) for key in figures[0]}
            matches = [f["exact_match"] for f in figures]
            row = _row(decoder, "checker of lines", n, matches, means["sequence_forwards"])
            results.take(row | {key: means[key] for key in ("forwards", "resampled", "last_ess")})
    panels = {"exact_match": f"worked additions, temperature 1, {decoder.partition(':')[0]}"}
    path = Path(f"{out / name}.png")
    plot_curves(results.rows, lambda row: row["method"], "sequence_forwards", panels, path, log_x=True)


def _row(spec: str, method: str, particles: int, values: list[float], cost: float) -> dict:
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    figures = {"exact_match": round(float(np.mean(values)), 4), "standard_error": round(error, 4)}
    return {"decoder": spec, "method": method, "particles": particles} | figures | {"sequence_forwards": round(cost, 1)}


if __name__ == "__main__":
    sys.exit(main(additions, "steering.additions"))
