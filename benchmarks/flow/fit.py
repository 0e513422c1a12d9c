"""Schedules fitted to a model: how well it guesses a masked token by how many others it sees, and what that is worth."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.flow.task import Task, make_task
from dfm.flow_config import FlowTraits
from dfm.networks import Bidirectional
from dfm.paths.fit import FittedSchedule, fit_schedule, isotonic_decreasing
from dfm.paths.schedulers import PowerScheduler


@torch.no_grad()
def masked_loss_curve(
    model, tokenizer, levels: int = 16, count: int = 32, held_out: bool = False, seed: int = 0
) -> Tensor:
    """L(j) [n]: mean cross-entropy in nats of a masked token with j others visible, behind the prompt.

    Measured at ``levels`` values of j on ``count`` problems each, whose canvas behind EOS holds the next problem, as the
    rows of the training did; linear in between, then the nearest falling curve.
    """
    task = make_task(tokenizer, count, held_out, seed)
    free = task.real & ~task.fixed
    n = int(free.sum(-1).max())
    ids = _clean_canvases(task, tokenizer)
    traits = FlowTraits.of(model.config)
    network = Bidirectional(model, task.real, traits, PowerScheduler())
    mask_id = model.generation_config.mask_token_id
    generator = torch.Generator().manual_seed(seed)
    visible = torch.linspace(0, n - 1, min(levels, n)).round().long().unique()
    losses = []
    for j in visible.tolist():
        order = torch.rand(free.shape, generator=generator).masked_fill(~free, 2).argsort(-1).argsort(-1)
        hidden = free & (order >= j)
        x = torch.where(hidden, mask_id, ids)
        logits = network(x, torch.full((count,), j / n, dtype=torch.float64), ~free)
        logits[..., mask_id] = -torch.inf
        losses.append(cross_entropy(logits[hidden], ids[hidden]).item())
    curve = torch.tensor(_interpolate(visible.tolist(), losses, n), dtype=torch.float64)
    return isotonic_decreasing(curve)


def _clean_canvases(task: Task, tokenizer) -> Tensor:
    """Canvases filled with the solutions; behind EOS the next problem of the list."""
    rows = []
    for i, row in enumerate(task.ids.tolist()):
        given, following = task.given[i], task.problems[(i + 1) % len(task.problems)]
        text = row[:given] + task.solved[i] + tokenizer(following.prompt + following.solution)["input_ids"]
        rows.append(text[: len(row)])
    return torch.tensor(rows)


def _interpolate(at: list[int], values: list[float], n: int) -> list[float]:
    if len(at) == 1:
        return values * n
    curve = []
    for j in range(n):
        right = next(i for i in range(1, len(at)) if at[i] >= j)
        share = (j - at[right - 1]) / (at[right] - at[right - 1])
        curve.append(values[right - 1] + share * (values[right] - values[right - 1]))
    return curve


def excess_rows(fit_on: Tensor, score_on: Tensor, rounds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What schedules lose to parallel decoding, in nats per text: fitted on one curve L(j), scored on another."""
    n = len(fit_on)
    for k in rounds:
        if k <= n:
            even = FittedSchedule(tuple(sorted({round(n * i / k) for i in range(k + 1)})))
            fitted = fit_schedule(fit_on, k)
            yield {
                "rounds": k,
                "excess_nats_even": round(even.excess(score_on), 3),
                "excess_nats_fitted": round(fitted.excess(score_on), 3),
                "quotas": list(fitted.quotas),
            }
