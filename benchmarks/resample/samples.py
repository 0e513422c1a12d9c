"""What revising tokens is worth: likelihood of held-out text, quality of samples, and both at equal forwards.

python -m benchmarks.resample.samples --model FOLDER --control FOLDER --texts FILE.jsonl
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.command import OUT, Name, Out, Overwrite, main, results_in
from benchmarks.resample.exact import measure_exactness
from benchmarks.resample.likelihood import measure_likelihood, next_token_losses
from eval.bench.contenders import Contender
from eval.bench.prompts import PromptSet
from finetune.data import read_texts
from setflow.commands.bench import Decoders, Device, Dtype, Prompts, open_bench
from setflow.commands.settings import parse_dtype
from setflow.loading import load_model

ITERATIONS = (0.5, 1, 1.5)
SPECS = (
    "rpt:iterations=0",
    *(f"rpt:iterations={k},accept=gibbs" for k in ITERATIONS),
    *(f"rpt:iterations={k},accept=argmax_threshold" for k in ITERATIONS),
)
BOUNDS = (0, 0.01, 0.05, 0.2, 0.6)
FORWARDS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # forwards per token at which the families are compared


def resample(
    model: Annotated[str, typer.Option("--model", help="Folder of a model trained with the rpt or sbd+rpt objective.")],
    control: Annotated[
        str | None, typer.Option(help="Folder of a model of as many next-token steps: its loss, and judge of samples.")
    ] = None,
    texts: Annotated[
        list[str] | None, typer.Option(help="JSONL files of held-out 'text' for the likelihoods; may be repeated.")
    ] = None,
    decoder: Decoders = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 100,
    documents: Annotated[int, typer.Option(min=1, help="Held-out documents of each file.")] = 100,
    exact: Annotated[
        int,
        typer.Option(
            min=0, help="Held-out tokens whose exact distribution is computed too, a row for each vocabulary entry."
        ),
    ] = 0,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="May be repeated; 0, 0.5 and 1 by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Runs at each temperature above 0.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    block_size: Annotated[int, typer.Option(min=2, help="Of the set-block decoders of the last table.")] = 8,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    out: Out = OUT,
    name: Name = "resample",
    overwrite: Overwrite = False,
) -> None:
    """What revising tokens is worth: held-out likelihood, quality of samples, and all families at equal forwards."""
    with results_in(out, name, overwrite) as results:
        loaded, tokenizer, prompt_sets = open_bench(model, dtype, device, prompts, count)
        judge = None if control is None else load_model(control, parse_dtype(dtype))[0].to(device)
        context = loaded.config.max_position_embeddings
        results.describe(loaded, seeds=seeds, batch_size=batch_size, control=control)

        def samples(chosen, specs, temperatures):
            return measure_samples(loaded, tokenizer, chosen, specs, temperatures, seeds, batch_size, judge)

        for path in texts or ():
            ids = [i[:context] for i in tokenizer(read_texts([path])[:documents])["input_ids"] if len(i) > 3]
            exactness = measure_exactness(loaded, ids, exact) if exact else {}
            results.take({"texts": Path(path).stem} | measure_likelihood(loaded, ids, judge) | exactness)
        for chosen in prompt_sets:
            for row in samples(chosen, decoder or SPECS, temperature or (0.0, 0.5, 1.0)):
                results.take(row)
            if getattr(loaded.generation_config, "trained_block_sizes", None):
                kinds = families(block_size)
                specs = [spec for kind in kinds.values() for spec in kind]
                measured = [results.take(row) for row in samples(chosen, specs, (0.0,))]
                quality = "exact_match" if chosen.problems is not None else "ntp_loss"
                for row in equal_forwards(measured, kinds, quality):
                    results.take({"prompts": chosen.name} | row)


def families(block_size: int) -> dict[str, tuple[str, ...]]:
    """Decoder specs that differ in what a token costs, by what they do."""
    sbd = tuple(f"sbd:block_size={block_size},anchor=true,entropy_bound={bound}" for bound in BOUNDS)
    return {
        "NTP": ("ntp",),
        "RPT": ("rpt:iterations=0.5", "rpt:iterations=0.5,accept=argmax_threshold"),
        "SBD": sbd,
        "SBD + RPT": tuple(f"{spec},revise=resample" for spec in sbd),
        "SBD + re-masking": tuple(f"{spec},revise=remask" for spec in sbd),
    }


def measure_samples(
    model,
    tokenizer,
    prompts: PromptSet,
    specs: Iterable[str],
    temperatures: Iterable[float],
    seeds: int,
    batch_size: int,
    judge=None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each temperature and decoder: exact match, likelihood, forwards and changes per token, tokens/s.

    ``ntp_loss`` is the next-token loss in nats per token of the sampled text under ``judge`` (by default the model itself).
    Intervals are 95 % normal intervals over seeds; greedy decoding has one.
    """
    for temperature in temperatures:
        for spec in specs:
            runs = [
                _run(model, tokenizer, prompts, spec, temperature, seed, batch_size, judge or model)
                for seed in range(seeds if temperature else 1)
            ]
            row = {"prompts": prompts.name, "decoder": spec, "temperature": temperature, "count": len(prompts.ids)}
            row["seeds"] = len(runs)
            for name in runs[0]:
                mean, half = _over_seeds([run[name] for run in runs])
                row[name] = round(mean, 4)
                if len(runs) > 1 and name in ("exact_match", "ntp_loss", "changes_per_token"):
                    row[f"{name}_plus_minus"] = round(half, 4)
            yield row


def equal_forwards(rows: Sequence[dict[str, Any]], by_family: dict[str, tuple[str, ...]], quality: str) -> list[dict]:
    """``quality`` of each family at the same forwards per token, interpolated between its decoders; None outside."""
    table = []
    for family, specs in by_family.items():
        points = sorted((row["forwards_per_token"], row[quality]) for row in rows if row["decoder"] in specs)
        cost, value = [list(column) for column in zip(*points, strict=True)]
        entry: dict[str, Any] = {"family": family, "from": cost[0], "to": cost[-1]}
        for forwards in FORWARDS:
            inside = cost[0] - 0.01 <= forwards <= cost[-1] + 0.01
            entry[f"{quality} at {forwards}"] = round(float(np.interp(forwards, cost, value)), 4) if inside else None
        table.append(entry)
    return table


def _run(
    model, tokenizer, prompts, spec: str, temperature: float, seed: int, batch_size: int, judge
) -> dict[str, float]:
    """One pass over the prompts."""
    contender = Contender(model, spec)
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    torch.manual_seed(seed)
    tokens = forwards = changes = correct = loss = seconds = 0.0
    for start in range(0, len(prompts.ids), batch_size):
        ids = prompts.ids[start : start + batch_size]
        sample = contender.run(ids, prompts.max_new_tokens, **settings)
        texts = tokenizer.batch_decode(sample.new_tokens, skip_special_tokens=True)
        tokens += sample.tokens
        forwards += sample.forwards
        seconds += sample.seconds
        changes += sample.changes
        correct += sum(bool(prompts.correct(start + i, text)) for i, text in enumerate(texts))
        for prompt, new in zip(ids, sample.new_tokens, strict=True):
            loss += next_token_losses(judge, prompt + new)[len(prompt) - 1 :].sum().item()
    result = {"exact_match": correct / len(prompts.ids)} if prompts.problems is not None else {}
    return result | {
        "ntp_loss": loss / tokens,
        "forwards_per_token": forwards / tokens,
        "changes_per_token": changes / tokens,
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
    }


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    if len(values) == 1:
        return values[0], math.nan
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5)


if __name__ == "__main__":
    sys.exit(main(resample, "resample.samples"))
