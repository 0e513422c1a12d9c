"""Power sampling: particles that follow p^alpha of whole texts, without any checker.

python -m benchmarks.steering.power
"""

import sys
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from benchmarks.steering.runs import run
from decoding import decoder_from_spec
from eval.bench.prompts import worked_additions
from setflow.loading import load_model
from steering import SteeredDecoder

ALPHAS = (1.0, 2.0, 4.0)


def power(
    decoder: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="May be repeated; ntp by default.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="May be repeated; 1, 2 and 4 by default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    particles: Annotated[int, typer.Option(min=2)] = 8,
    base: Annotated[float, typer.Option(help="Temperature of p itself; above 1 there is more to mend.")] = 1.0,
    ramp: Annotated[int, typer.Option(min=0, help="Tokens over which alpha comes to count.")] = 32,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Out = OUT,
    name: Name = "steering-power",
    overwrite: Overwrite = False,
) -> None:
    """Exact match of texts drawn at temperature 1 / alpha, and of those that particles make p^alpha of.

    With --base B the model's logits are divided by B first, so that p is the model at temperature B.
    """
    with results_in(out, name, overwrite) as results:
        model, tokenizer = load_model(None, torch.float32)
        if base != 1:
            _flatten(model, base)
        results.describe(model, count=count, particles=particles, base=base, ramp=ramp, seeds=seeds)
        prompts = worked_additions(tokenizer, count)
        for spec in decoder or ("ntp",):
            for power_of_p in alpha or ALPHAS:
                temperature = 1 / power_of_p
                steered = SteeredDecoder(decoder_from_spec(spec), alpha=power_of_p, particles=particles, ramp=ramp)
                runs = [run(model, tokenizer, prompts, steered, temperature, seed) for seed in range(seeds)]
                unsteered = SteeredDecoder(decoder_from_spec(spec), alpha=power_of_p, particles=1)
                plain = [run(model, tokenizer, prompts, unsteered, temperature, seed) for seed in range(seeds)]
                for method, group in ((f"p^{power_of_p:g}, particles", runs), (f"temperature {temperature:g}", plain)):
                    figures = [one.figures() for one in group]
                    matches = [one["exact_match"] for one in figures]
                    error = np.std(matches, ddof=1) / len(matches) ** 0.5 if len(matches) > 1 else float("nan")
                    row = {
                        "decoder": spec,
                        "alpha": power_of_p,
                        "method": method,
                        "standard_error": round(float(error), 4),
                    }
                    results.take(row | {k: round(float(np.mean([f[k] for f in figures])), 4) for k in figures[0]})


def _flatten(model, temperature: float) -> None:
    """Make the model's own distribution that of ``temperature``."""
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits / temperature)


if __name__ == "__main__":
    sys.exit(main(power, "steering.power"))
