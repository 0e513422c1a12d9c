"""Quality against forwards for the samplers of flow matching, on whole texts behind a prompt.

The task is worked additions of two digits: a completion is right or wrong, a next-token model judges how likely it is.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dfm import FlowDecoder
from dfm.flow_config import FlowTraits
from dfm.networks import Bidirectional
from dfm.paths.fit import FittedSchedule, fit_schedule, isotonic_decreasing
from dfm.paths.schedulers import PowerScheduler
from eval.additions import Addition
from eval.bench.flow_likelihood import generative_perplexity, judged_nats, unigram_entropy

FITTED = "fitted"
ALL_STEPS = (8, 16, 32, 64, 128, 256)
# One curve each: source, sampler, schedule, steps (half of them where a step takes two evaluations).
CURVES: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
    ("mask", "exact", "linear", ALL_STEPS),
    ("mask", "exact", FITTED, (8, 16, 32, 64)),
    ("mask", "euler", "linear", (8, 32, 128)),
    ("mask", "euler_x1", "linear", (8, 16, 32, 64)),
    ("mask", "tau_leap", "linear", (8, 32, 128)),
    ("mask", "psi", "linear", (8, 32, 128)),
    ("mask", "corrector", "linear", (8, 32, 128)),
    ("mask", "adaptive", "linear", (8, 32, 128)),
    ("mask", "remdm", "linear", (8, 32, 128)),
    ("mask", "theta_trapezoidal", "linear", (4, 16, 32)),
    ("mask", "topk", "linear", (8, 16, 32, 64)),
    ("mask", "topk", FITTED, (8, 16, 32, 64)),
    ("mask", "p2", "linear", (8, 32, 128)),
    ("mask", "first_hitting", "linear", (0,)),
    ("uniform", "exact", "linear", ALL_STEPS),
    ("uniform", "d3pm", "linear", (8, 16, 32, 64)),
    ("uniform", "corrector", "linear", (8, 32, 128)),
    ("uniform", "uniformisation", "linear", (0,)),
    ("uniform", "gibbs", "linear", (4, 16, 64)),
)


@dataclass(frozen=True)
class Task:
    """Problems as canvases [N, L]: a prompt, then room for the solution, EOS and the padding that ragged prompts need."""

    problems: list[Addition]
    ids: Tensor
    fixed: Tensor
    real: Tensor
    solved: list[list[int]] = field(repr=False)

    @property
    def given(self) -> list[int]:
        """Tokens of each prompt."""
        return self.fixed.sum(-1).tolist()


def make_task(tokenizer, count: int, held_out: bool = True, seed: int = 1) -> Task:
    """``count`` different problems of two digits; the canvas behind a prompt holds any of their solutions."""
    pairs = [Addition(a, b) for a in range(10, 100) for b in range(10, 100)]
    problems = [problem for problem in pairs if problem.is_held_out == held_out]
    random.Random(seed).shuffle(problems)
    if len(problems) < count:
        raise ValueError(f"count must be at most {len(problems)}, so many problems there are, got {count}")
    problems = problems[:count]
    end = [tokenizer.eos_token_id]
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    whole = [tokenizer(problem.prompt + problem.solution)["input_ids"] + end for problem in problems]
    solutions = [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]
    room = max(map(len, solutions))
    length = max(map(len, prompts)) + room
    index = torch.arange(length)
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    ids = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts])
    return Task(problems, ids, index < starts, index < starts + room, solutions)


@dataclass
class Completion:
    """What a run gave: completions up to their EOS, in tokens, and forwards of each."""

    tokens: list[list[int]]
    forwards: list[int]


def complete(model, decoder: FlowDecoder, task: Task, temperature: float, seed: int) -> Completion:
    """Fill all canvases in one batch."""
    out = decoder.infill(model, task.ids, task.fixed, attention_mask=task.real, temperature=temperature, seed=seed)
    end, completions = model.generation_config.eos_token_id, []
    for row, fixed, real in zip(out.tokens.tolist(), task.fixed.tolist(), task.real.tolist(), strict=True):
        new = [token for token, kept, shown in zip(row, fixed, real, strict=True) if shown and not kept]
        completions.append(new[: new.index(end) + 1] if end in new else new)
    return Completion(completions, out.evaluations.tolist())


def judge_completions(judge, tokenizer, task: Task, completions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Exact match, generative perplexity of the completions behind their prompts, and their unigram entropy."""
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = sum(problem.is_answered_by(text) for problem, text in zip(task.problems, texts, strict=True))
    prompts = [ids[fixed].tolist() for ids, fixed in zip(task.ids, task.fixed, strict=True)]
    whole = [prompt + list(new) for prompt, new in zip(prompts, completions, strict=True)]
    return {
        "exact_match": round(right / len(task.problems), 4),
        **generative_perplexity(judged_nats(judge, whole, task.given)),
        "unigram_entropy_bits": unigram_entropy([list(new) for new in completions if new]),
    }


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


def make_decoder(source: str, sampler: str, schedule: str, steps: int, curve: Tensor | None) -> FlowDecoder:
    """The decoder of one point; a fitted schedule has as many rounds as steps, at most one for each token."""
    if schedule != FITTED:
        return FlowDecoder(path=source, sampler=sampler, scheduler=schedule, steps=steps or None)
    rounds = min(steps, len(curve))
    return FlowDecoder(path=source, sampler=sampler, scheduler=fit_schedule(curve, rounds), steps=rounds)


def curve_of(row: dict[str, Any]) -> str:
    """The curve that a row of :func:`measure_sweep` is a point of."""
    return f"{row['source']}: {row['sampler']}" + (
        "" if row["schedule"] == "linear" else f", {row['schedule']} schedule"
    )


def pending(curves, done: Sequence[dict[str, Any]], sources: Sequence[str]) -> list[tuple[str, str, str, int]]:
    """The points of ``curves`` for these sources that are not among the rows ``done``."""
    known = {(row["source"], row["sampler"], row["schedule"], row["steps"]) for row in done if "sampler" in row}
    points = [(*curve[:3], steps) for curve in curves for steps in curve[3] if curve[0] in sources]
    return [point for point in points if point not in known]


def measure_sweep(
    models: dict[str, Any],
    judge,
    tokenizer,
    task: Task,
    points: Sequence[tuple[str, str, str, int]],
    curve: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """A row for each point (source, sampler, schedule, steps) on the model of its source.

    curve: L(j) for fitted schedules. All points have the same problems, seeds and temperature.
    """
    for source, sampler, schedule, steps in points:
        decoder = make_decoder(source, sampler, schedule, steps, curve)
        found = complete(models[source], decoder, task, temperature, seed)
        yield {
            "source": source,
            "sampler": sampler,
            "schedule": schedule,
            "steps": steps,
            "forwards": round(sum(found.forwards) / len(found.forwards), 1),
            **judge_completions(judge, tokenizer, task, found.tokens),
        }


def reference_rows(judge, tokenizer, task: Task, temperature: float = 1.0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The same figures of the true solutions, and of what ``judge`` itself writes token by token."""
    yield {"source": "data", **judge_completions(judge, tokenizer, task, task.solved)}
    torch.manual_seed(seed)
    room = int((task.real & ~task.fixed).sum(-1).max())
    written = []
    for ids, fixed in zip(task.ids, task.fixed, strict=True):
        prompt = ids[fixed][None]
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        out = judge.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=room, **settings)
        written.append(out[0, prompt.shape[1] :].tolist())
    forwards = round(sum(map(len, written)) / len(written), 1)
    yield {"source": "next token", "forwards": forwards, **judge_completions(judge, tokenizer, task, written)}
