"""Is self-speculation word for word what ``model.generate(do_sample=False)`` says?"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from decoding.forward.base_check import sample_weights
from decoding.forward.beside import saved_beside
from eval.bench.contenders import Contender
from eval.bench.prompts import PromptSet
from eval.finished import Finished, request_key


def measure_losslessness(
    model,
    prompts: PromptSet,
    specs: Iterable[str],
    batch_sizes: Iterable[int] = (1, 8),
    finished: Finished | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Yield one row for each decoder and batch size: how many prompts differ from stock greedy decoding, one by one.

    For those that do: how far apart the two best logits were, by a plain forward, where the texts part. In float32
    nothing should differ; in bf16 rows of other shapes round otherwise, so near-ties can fall the other way.

    finished: keeps each batch as soon as it is done, and what it holds is not run again. advance: called after each batch;
    there are :func:`count_batches` of them.
    """
    texts = _Texts(model, prompts, finished or Finished(), advance)
    reference = texts.of("generate", 1)[0]
    for spec in specs:
        for batch_size in batch_sizes:
            new_tokens, forwards = texts.of(spec, batch_size)
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
                "new_tokens": prompts.max_new_tokens,
                "different": len(gaps),
                "largest_logit_gap_at_difference": round(max(gaps), 4) if gaps else None,
                "tokens_per_forward": round(sum(map(len, new_tokens)) / forwards, 3),
            }


def count_batches(prompts: PromptSet, num_specs: int, batch_sizes: Sequence[int]) -> int:
    """How many batches :func:`measure_losslessness` runs."""
    count = len(prompts.ids)
    return count + num_specs * sum(-(-count // size) for size in batch_sizes)


class _Texts:
    """What each decoder makes of the prompts, from what is finished where it is there."""

    def __init__(self, model, prompts: PromptSet, finished: Finished, advance: Callable[[], None]):
        self.model, self.prompts, self.finished, self.advance = model, prompts, finished, advance
        added = [float(w.double().sum()) for part in saved_beside(model).values() for w in part.parameters()]  # type: ignore
        self.identity = [model.name_or_path, str(model.dtype), sample_weights(model), added, prompts.max_new_tokens]

    def of(self, spec: str, batch_size: int) -> tuple[list[list[int]], int]:
        """New tokens of each prompt, and forwards in all."""
        contender = Contender(self.model, spec)
        tokens, forwards = [], 0
        with self.finished.writing():
            for start in range(0, len(self.prompts.ids), batch_size):
                batch = self.prompts.ids[start : start + batch_size]
                key = request_key(*self.identity, spec, batch)
                if key not in self.finished:
                    sample = contender.run(batch, self.prompts.max_new_tokens)
                    self.finished.add([{"key": key, "new_tokens": sample.new_tokens, "forwards": sample.forwards}])
                tokens += self.finished[key]["new_tokens"]
                forwards += self.finished[key]["forwards"]
                self.advance()
        return tokens, forwards


@torch.no_grad()
def gap_at_difference(model, prompt: list[int], expected: list[int], got: list[int]) -> float:
    """Difference of the two largest logits where ``got`` leaves ``expected``, by a plain forward."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    ids = torch.tensor([[*prompt, *expected[:at]]], device=model.device)
    best = model(input_ids=ids).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
