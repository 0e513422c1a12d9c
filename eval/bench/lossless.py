"""Is self-speculation word for word what ``model.generate(do_sample=False)`` says?"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from eval.bench.contenders import Contender
from eval.bench.prompts import PromptSet


def measure_losslessness(
    model, prompts: PromptSet, specs: Iterable[str], batch_sizes: Iterable[int] = (1, 8)
) -> Iterator[dict[str, Any]]:
    """Yield one row for each decoder and batch size: how many prompts differ from stock greedy decoding, one by one.

    For those that do: how far apart the two best logits were, by a plain forward, where the texts part. In float32
    nothing should differ; in bf16 rows of other shapes round otherwise, so near-ties can fall the other way.
    """
    stock = Contender(model, "generate")
    reference = [stock.run([ids], prompts.max_new_tokens).new_tokens[0] for ids in prompts.ids]
    for spec in specs:
        contender = Contender(model, spec)
        for batch_size in batch_sizes:
            new_tokens, forwards = [], 0
            for start in range(0, len(prompts.ids), batch_size):
                sample = contender.run(prompts.ids[start : start + batch_size], prompts.max_new_tokens)
                new_tokens += sample.new_tokens
                forwards += sample.forwards
            gaps = [
                gap_at_difference(model, ids, expected, got)
                for ids, expected, got in zip(prompts.ids, reference, new_tokens, strict=True)
                if expected != got
            ]
            yield {
                "prompts": prompts.name,
                "decoder": spec,
                "batch_size": batch_size,
                "count": len(prompts.ids),
                "different": len(gaps),
                "largest_logit_gap_at_difference": round(max(gaps), 4) if gaps else None,
                "tokens_per_forward": round(sum(map(len, new_tokens)) / forwards, 3),
            }


@torch.no_grad()
def gap_at_difference(model, prompt: list[int], expected: list[int], got: list[int]) -> float:
    """Difference of the two largest logits where ``got`` leaves ``expected``, by a plain forward."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    ids = torch.tensor([[*prompt, *expected[:at]]], device=model.device)
    best = model(input_ids=ids).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
