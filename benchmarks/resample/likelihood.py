"""Likelihood of held-out text: next-token losses against those of previous-token rows, which see one token more."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding import Engine
from decoding.forward.rows import RowList
from rpt.config import ResampleConfig
from rpt.previous_rows import add_previous_rows

RESAMPLES = 1000


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
    config, rows, tokens = ResampleConfig.from_config(model.config), RowList(), list(tokens)
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


def _over_documents(sums: np.ndarray, lengths: np.ndarray) -> tuple[float, float, float]:
    """Mean per token and its 95 % bootstrap interval over documents."""
    draws = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(1) / lengths[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / lengths.sum()), float(low), float(high)
