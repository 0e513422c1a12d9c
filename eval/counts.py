"""Tokens, forwards and seconds: what decoding cost, for each sample and for all together."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from decoding import DecodeOutput


def count(output: DecodeOutput, seconds: float) -> list[dict[str, Any]]:
    """One dict of costs for each sequence of ``output``, which took ``seconds`` for all of them together.

    Tokens and forwards are counted up to the sequence's first stop, forwards that only fill the cache apart.
    """
    drafted = output.acceptance_lengths or [None] * len(output.forwards)
    rows = zip(output.new_tokens.tolist(), output.forwards.tolist(), drafted, strict=True)
    return [
        {
            "tokens": tokens,
            "forwards": forwards,
            "tokens_per_forward": tokens / max(forwards, 1),
            "prefill_forwards": output.prefill_forwards,
            # The share of the batch's time, so that the samples' seconds add up to the run's.
            "seconds": seconds / len(output.forwards),
            "batch_size": len(output.forwards),
            **({} if accepted is None else {"acceptance_lengths": list(accepted)}),
        }
        for tokens, forwards, accepted in rows
    ]


def total(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The costs of all ``samples`` together: means are over tokens, not over samples.

    tokens_per_second: with batches, of all sequences that ran together. acceptance_lengths: how often a draft had 0, 1,
    2, ... of its tokens accepted. cut_prompts: how many prompts were too long and lost their beginning.
    """
    samples = list(samples)
    tokens, forwards = sum(s["tokens"] for s in samples), sum(s["forwards"] for s in samples)
    seconds = sum(s["seconds"] for s in samples)
    accepted = Counter(length for s in samples for length in s.get("acceptance_lengths", ()))
    result = {
        "samples": len(samples),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / max(forwards, 1),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "cut_prompts": sum(bool(s.get("cut_prompt_tokens")) for s in samples),
    }
    if accepted:
        result["acceptance_lengths"] = [accepted[n] for n in range(max(accepted) + 1)]
        result["mean_acceptance_length"] = sum(n * c for n, c in accepted.items()) / accepted.total()
    return result
