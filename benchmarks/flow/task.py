"""The task of the sweep: worked additions of two digits, whole solutions behind a prompt.

A completion is right or wrong, and a next-token model judges how likely it is. Shapes: N problems, L tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.flow.judging import generative_perplexity, judged_nats, unigram_entropy
from dfm import FlowDecoder
from eval.additions import Addition
from eval.bench.contenders import until_end


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
        completions.append(until_end(new, end))
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
