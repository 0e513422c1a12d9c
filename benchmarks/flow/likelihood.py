"""Likelihood bounds of flow-matching models on held-out rows (ELBO), and what can be said about their own samples.

    python -m benchmarks.flow.likelihood --model FOLDER --texts FILE.jsonl

Shapes: N rows, L tokens, V vocabulary. Bounds are in nats.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import OUT, Judge, Name, Out, Overwrite, main, results_in
from benchmarks.flow.judging import WARNING, judge_samples
from dfm import FlowDecoder
from dfm.draws import Draws
from dfm.flow_config import FlowTraits
from dfm.networks import Bidirectional
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.rates.conditional import ReversalVelocity
from dfm.rates.losses import generalised_kl, rate_bound, stratified_times
from eval.bench.results import progress
from finetune.data import Source, load_documents
from finetune.packing import PackedDataset
from setflow.loading import load_model


def likelihood(
    model: Annotated[list[str], typer.Option("--model", help="Folder of a model trained on whole texts; repeatable.")],
    texts: Annotated[Path, typer.Option(help="JSONL file of held-out 'text'.")],
    judge: Judge = None,
    rows: Annotated[int, typer.Option(min=2, help="Held-out rows.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row: as in the training.")] = 104,
    times: Annotated[int, typer.Option(min=1, help="Noise levels in all, stratified.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the samples that are judged.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    seed: int = 0,
    out: Out = OUT,
    name: Name = "flow-likelihood",
    overwrite: Overwrite = False,
) -> None:
    """Held-out ELBO perplexity; generative perplexity and unigram entropy of whole rows; MAUVE if it is installed."""
    with results_in(out, name, overwrite) as results:
        judging, tokenizer = load_model(judge, torch.float32)
        held_out = PackedDataset(load_documents([Source(str(texts))], tokenizer), length)
        data = torch.stack([held_out[i]["input_ids"] for i in range(min(rows, len(held_out)))])
        given = torch.arange(length)[None].expand_as(data) == 0
        results.describe(judging, warning=WARNING, texts=str(texts), length=length, seed=seed)
        results.take({"model": "held-out text", **judge_samples(judging, data.tolist(), data.tolist())})
        for folder in model:
            chosen, _ = load_model(folder, torch.float32)
            with progress(title="noise levels", total=bound_batches(len(data), times, batch_size)) as advance:
                bound = likelihood_bound(chosen, data, times, batch_size, seed, advance)
            decoder = FlowDecoder(path=FlowTraits.of(chosen.config).source, steps=steps)
            samples = decoder.infill(chosen, data, given, seed=seed).tokens
            row = {"model": folder, **bound, "steps": steps}
            results.take(row | judge_samples(judging, samples.tolist(), data.tolist()))
    print(WARNING, file=sys.stderr)


@torch.no_grad()
def likelihood_bound(
    model,
    rows: Tensor,
    times: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Upper bounds on -log p per token of whole rows [N, L], their first token given.

    ``times`` noise levels in all, stratified and uniform in kappa. Of the forward rates; for a uniform source also of the
    reversal rates, whose bound is tighter, so that only that one may be compared with a mask model's. ``advance`` is
    called for each batch. ValueError for a model that was trained with blocks.
    """
    traits = FlowTraits.of(model.config)
    if getattr(model.config, "flow", None) is None or traits.block_sizes is not None:
        raise ValueError("model must be one that was trained with the dfm objective on whole texts")
    source = traits.make_source(
        model.get_input_embeddings().weight.shape[0], getattr(model.generation_config, "mask_token_id", None)
    )
    # With kappa = t times are levels; the bound is the same for every scheduler.
    path = MixturePath(source, PowerScheduler())
    reversal = ReversalVelocity(path) if source.mask_id is None else None
    generator = torch.Generator().manual_seed(seed)
    each = max(1, times // len(rows))
    levels = torch.stack([stratified_times(each, generator, 1.0) for _ in rows])
    bounds = {"forward": torch.zeros(len(rows)), "reversal": torch.zeros(len(rows))}
    given = torch.arange(rows.shape[1]) == 0
    for i, start in _batches(len(rows), each, batch_size):
        x1, t = rows[i].expand(min(batch_size, each - start), -1), levels[i, start : start + batch_size]
        noise = torch.rand(x1.shape, generator=generator, dtype=torch.float64) >= t[:, None]
        z = torch.where(noise & ~given, source.sample(x1, Draws([generator] * len(x1))), x1)
        network = Bidirectional(model, torch.ones_like(z, dtype=torch.bool), traits, path.scheduler)
        logits = network(z, t, given.expand_as(z))
        if source.mask_id is not None:
            logits[..., source.mask_id] = -torch.inf
            loss = torch.where(noise, generalised_kl(logits, z, x1, t, path), 0)
        else:
            loss = generalised_kl(logits, z, x1, t, path)
            p1 = logits.softmax(-1)
            tight = rate_bound(reversal.at(z, x1, t).to(p1), reversal.marginal(z, t, p1), z)
            bounds["reversal"][i] += tight[:, ~given].sum() / each
        bounds["forward"][i] += loss[:, ~given].sum() / each
        advance()
    count = rows.shape[1] - 1
    kinds = ["forward"] if reversal is None else ["forward", "reversal"]
    result: dict[str, Any] = {"source": traits.source, "rows": len(rows), "times": each * len(rows)}
    for kind in kinds:
        per_token = bounds[kind] / count
        result[f"{kind}_bound_nats"] = round(per_token.mean().item(), 4)
        result[f"{kind}_bound_error"] = round(per_token.std().item() / math.sqrt(len(rows)), 4)
        result[f"{kind}_elbo_perplexity"] = round(per_token.mean().exp().item(), 3)
    return result


def bound_batches(rows: int, times: int, batch_size: int) -> int:
    """How many batches :func:`likelihood_bound` runs."""
    return len(list(_batches(rows, max(1, times // rows), batch_size)))


def _batches(rows: int, each: int, batch_size: int):
    return ((i, start) for i in range(rows) for start in range(0, each, batch_size))


if __name__ == "__main__":
    sys.exit(main(likelihood, "flow.likelihood"))
