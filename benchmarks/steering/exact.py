"""Distance of the weighted particles from the exact target, and bias of the normaliser, on a model whose texts are all known.

python -m benchmarks.steering.exact
"""

import math
import sys
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from benchmarks.steering.toys import Text, likes_zeros, measured, normalised, total_variation, toy
from decoding import decoder_from_spec
from steering import SteeredDecoder

SPECS = ("ntp", "sbd-lossless:block_size=3")
PARTICLES = (1, 4, 16)


def exact(
    decoder: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="May be repeated; lossless ones.")] = None,
    particles: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated; 1 to 16 by default.")] = None,
    runs: Annotated[int, typer.Option(min=2, help="Of each kind.")] = 1000,
    out: Out = OUT,
    name: Name = "steering-exact",
    overwrite: Overwrite = False,
) -> None:
    """Total variation of the weighted particles, averaged over runs, from the target; and the mean of exp(log normaliser).

    A reward of single tokens in float64, and the square of the model's distribution proposed at temperature 1/2. "no
    weights" is the control: the same particles, each of the same weight. "standard_errors" is how far the mean of the
    normaliser is from the truth.
    """
    with results_in(out, name, overwrite) as results:
        tilted, squared = toy(torch.float64), toy(torch.float64, temperature=0.5)
        results.describe(tilted.model, runs=runs)
        plain = tilted.texts()
        by_reward, tilt = normalised({text: p * math.exp(_reward(text)) for text, p in plain.items()})
        by_power, power = normalised({text: p**2 for text, p in squared.texts(1.0, with_mask=True).items()})
        for spec in decoder or SPECS:
            inner = decoder_from_spec(spec)
            for count in particles or PARTICLES:
                rewarded = SteeredDecoder(inner, likes_zeros, count, every=2)
                results.take(_row(spec, "exp(reward) q", count, tilted, rewarded, runs, by_reward, tilt))
                squares = SteeredDecoder(inner, particles=count, alpha=2.0, every=2)
                results.take(_row(spec, "p^2", count, squared, squares, runs, by_power, power))
            unsteered = SteeredDecoder(inner, _nothing, max(particles or PARTICLES), every=2)
            count = unsteered.particles
            results.take(_row(spec, "no weights", count, tilted, unsteered, runs, by_reward, tilt))


def _row(spec, target_name, count, model, steered, runs, target, normaliser) -> dict:
    """Runs in batches of at most 4,096 sequences."""
    size = max(1, 4096 // count)
    found: dict[Text, float] = {}
    estimates = []
    for start in tqdm(range(0, runs, size), desc=f"{spec}, {count} particles", leave=False):
        output = model.run(steered, min(size, runs - start), seed=start)
        estimates.append(output.log_normaliser.exp())
        for text, weight in measured(output, by_normaliser=False).items():
            found[text] = found.get(text, 0.0) + weight * len(output.chosen) / runs
    values = torch.cat(estimates)
    error = float(values.std()) / runs**0.5
    off = abs(float(values.mean()) - normaliser)
    return {
        "decoder": spec,
        "target": target_name,
        "particles": count,
        "total_variation": round(total_variation(found, target), 4),
        "normaliser": round(normaliser, 4),
        "mean_estimate": round(float(values.mean()), 4),
        "standard_errors": round(off / error, 2) if error else None,
    }


def _reward(text: Text) -> float:
    return likes_zeros([list(text)], [True])[0]


def _nothing(completion_ids: list[list[int]], finished: list[bool]) -> list[float]:
    return [0.0] * len(completion_ids)


if __name__ == "__main__":
    sys.exit(main(exact, "steering.exact"))
