"""What steering costs: seconds of weights, resampling and copying in a run, and memory, against a batch of the same size.

python -m benchmarks.steering.cost
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Annotated, Any

import torch
import typer

import decoding.decoder
from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from benchmarks.steering.memory import random_ids, run_once
from decoding import decoder_from_spec
from eval.bench.prompts import worked_additions
from setflow.loading import load_model
from steering import SteeredDecoder

SPECS = ("ntp", "sbd:block_size=8")
ROUNDS = 3


def cost(
    decoder: Annotated[list[str] | None, typer.Option(metavar="SPEC", help="May be repeated.")] = None,
    particles: Annotated[int, typer.Option(min=2)] = 16,
    new_tokens: Annotated[int, typer.Option(min=16)] = 128,
    out: Out = OUT,
    name: Name = "steering-cost",
    overwrite: Overwrite = False,
) -> None:
    """Share of a run's time that steering takes when every judgement resamples, and peak memory.

    The reward looks at token ids and costs nothing; what a user's own costs is the user's. Texts are not ended by EOS. In
    turns with a plain batch of as many copies of the prompt; median of 3 rounds.
    """
    with results_in(out, name, overwrite) as results:
        model, tokenizer = load_model(None, torch.float32)
        model.generation_config.eos_token_id = None
        results.describe(model, particles=particles, new_tokens=new_tokens, rounds=ROUNDS)
        prompt = worked_additions(tokenizer, 1).ids[0]
        for spec in decoder or SPECS:
            steered = SteeredDecoder(decoder_from_spec(spec), random_ids, particles, ess_threshold=1.0)
            rounds = []
            for _ in range(ROUNDS + 1):
                with _timed() as spent:
                    output, seconds = run_once(model, prompt, steered, 1, new_tokens)
                plain, plain_seconds = run_once(model, prompt, steered.decoder, particles, new_tokens)
                resampled = sum(judgement.ancestors is not None for judgement in output.judgements[0])
                forwards = int(output.forwards[0])
                rounds.append(
                    {
                        "share": (spent["weights"] + spent["copies"]) / seconds,
                        "step_milliseconds": 1e3 * seconds / forwards,
                        "plain_step_milliseconds": 1e3 * plain_seconds / int(plain.forwards.max()),
                        "weights_milliseconds_per_resampling": 1e3 * spent["weights"] / resampled,
                        "copies_milliseconds_per_resampling": 1e3 * spent["copies"] / resampled,
                        "forwards": forwards,
                        "resamplings": resampled,
                    }
                )
            figures = {key: round(median(one[key] for one in rounds[1:]), 4) for key in rounds[0]}
            results.take({"decoder": spec, "particles": particles} | figures | _memory(spec, particles, new_tokens))


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Count the seconds in judging, weighing and copying states, and in copying keys and values."""
    spent = {"weights": 0.0, "copies": 0.0}
    places = (("weights", SteeredDecoder, "resample"), ("copies", decoding.decoder, "follow"))
    originals = [getattr(place, name) for _, place, name in places]

    def timed(key, original):
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                spent[key] += time.perf_counter() - started

        return call

    for (key, place, name), original in zip(places, originals, strict=True):
        setattr(place, name, timed(key, original))
    try:
        yield spent
    finally:
        for (_, place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def _memory(spec: str, particles: int, new_tokens: int) -> dict[str, float]:
    """Peak MiB above the idle process, each in a process of its own."""
    peaks = {}
    for who in ("steered", "plain"):
        command = [sys.executable, "-m", "benchmarks.steering.memory", who, spec, str(particles), str(new_tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[who] = json.loads(done.stdout.splitlines()[-1]) / 2**20
    return {f"{who}_peak_mib": round(peak, 1) for who, peak in peaks.items()}


if __name__ == "__main__":
    sys.exit(main(cost, "steering.cost"))
