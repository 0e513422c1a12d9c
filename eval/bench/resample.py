"""What revising tokens is worth: likelihood of held-out text, quality of samples, and both at equal forwards."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding import Engine
from decoding.forward.rows import RowList
from decoding.previous import ResampleConfig, add_previous_rows
from eval.bench.contenders import Contender
from eval.bench.prompts import PromptSet

ITERATIONS = (0.5, 1, 1.5)
SPECS = (
    "rpt:iterations=0",
    *(f"rpt:iterations={k},accept=gibbs" for k in ITERATIONS),
    *(f"rpt:iterations={k},accept=argmax_threshold" for k in ITERATIONS),
)
BOUNDS = (0, 0.01, 0.05, 0.2, 0.6)
FORWARDS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # forwards per token at which the families are compared
RESAMPLES = 1000


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


@torch.no_grad()
def measure_likelihood(model, documents: Sequence[Sequence[int]], control=None) -> dict[str, Any]:
    """Cross-entropies in nats per token of held-out documents (token ids), next-token and previous-token.

    Token i is predicted from those before it, and from those before it and token i + 1; the last token of a document
    and its first are left out of both. ``raised`` is the share of tokens that the second makes likelier, ``gained`` by how
    much its loss is lower. Intervals are 95 % bootstrap intervals over documents. ``control``: a model whose next-token
    loss on the same tokens is reported.
    """
    columns: dict[str, list[Tensor]] = {"ntp": [], "ptp": []} | ({"control": []} if control is not None else {})
    for tokens in documents:
        ntp, ptp = document_losses(model, tokens)
        columns["ntp"].append(ntp)
        columns["ptp"].append(ptp)
        if control is not None:
            columns["control"].append(next_token_losses(control, tokens)[:-1])
    pairs = list(zip(columns["ntp"], columns["ptp"], strict=True))
    shares = {"raised": [(p < n).float() for n, p in pairs], "gained": [n - p for n, p in pairs]}
    lengths = np.array([len(column) for column in columns["ntp"]])
    result: dict[str, Any] = {"documents": len(documents), "tokens": int(lengths.sum())}
    for name, parts in (columns | shares).items():
        mean, low, high = _over_documents(np.array([part.sum().item() for part in parts]), lengths)
        result[name if name in shares else f"{name}_loss"] = round(mean, 4)
        result[f"{name}_interval"] = [round(low, 4), round(high, 4)]
    return result


def document_losses(model, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Next-token and previous-token losses in nats of tokens 1 .. n - 2, in one forward of about 3 n rows."""
    config, rows, tokens = ResampleConfig.of(model.config), RowList(), list(tokens)
    causal = rows.add_causal(tokens, 0)
    judged, slot = [], len(tokens)
    for i in range(1, len(tokens) - 1):
        added = add_previous_rows(rows, tokens, i, 2, config, slot, config.prev_target == "follow")
        slot += len(added)
        judged.append(added[-1])
    engine = Engine(model)
    step = engine.step([rows], engine.new_cache(1))
    labels = torch.tensor(tokens[1:-1], device=engine.device)
    both = (causal[: len(tokens) - 2], judged)
    ntp, ptp = (torch.nn.functional.cross_entropy(step.logits([(0, r)]), labels, reduction="none") for r in both)
    return ntp.cpu(), ptp.cpu()


@torch.no_grad()
def next_token_losses(model, tokens: Sequence[int]) -> Tensor:
    """Next-token losses in nats of all tokens but the first."""
    ids = torch.tensor([list(tokens)], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu()


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


def _over_documents(sums: np.ndarray, lengths: np.ndarray) -> tuple[float, float, float]:
    """Mean per token and its 95 % bootstrap interval over documents."""
    draws = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(1) / lengths[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / lengths.sum()), float(low), float(high)


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    if len(values) == 1:
        return values[0], math.nan
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5)
