"""Accuracy against tokens per forward, for any number of decoders on the same prompts."""

from collections.abc import Iterable, Iterator
from typing import Any

from eval.bench.contenders import Contender
from eval.bench.prompts import PromptSet

BOUNDS = (0, 0.01, 0.1, 0.35, 1)
LOSSLESS_SPECS = (
    "sbd-lossless:block_size=4",
    "sbd-lossless:block_size=8",
    "sbd-lossless:block_size=16",
    "sbd-lossless:block_size=8,draft=both",
    "prompt-lookup:block_size=8",
)
DEFAULT_SPECS = (
    "ntp",
    *(f"sbd:block_size=16,entropy_bound={bound}" for bound in BOUNDS),
    *(f"sbd:block_size=16,entropy_bound={bound},anchor=true" for bound in BOUNDS),
    *(f"sbd:block_size=16,entropy_bound={bound},anchor=true,commit=prefix" for bound in (*BOUNDS, 0.05)),
    *LOSSLESS_SPECS,
)


def measure_quality(
    model, tokenizer, prompts: PromptSet, specs: Iterable[str] = DEFAULT_SPECS, batch_size: int = 8, **settings: Any
) -> Iterator[dict[str, Any]]:
    """Yield one row for each decoder: exact match (where there are answers), tokens per forward, acceptance lengths.

    ``tau``: tokens of a draft-verify cycle, the accepted drafts and the token behind them.

    ``settings`` go to ``generate``, for instance do_sample and temperature.
    """
    for spec in specs:
        contender = Contender(model, spec)
        tokens = forwards = correct = 0
        accepted: list[int] = []
        for start in range(0, len(prompts.ids), batch_size):
            sample = contender.run(prompts.ids[start : start + batch_size], prompts.max_new_tokens, **settings)
            tokens += sample.tokens
            forwards += sample.forwards
            accepted += sample.acceptance_lengths
            texts = tokenizer.batch_decode(sample.new_tokens, skip_special_tokens=True)
            correct += sum(bool(prompts.correct(start + i, text)) for i, text in enumerate(texts))
        row = {
            "prompts": prompts.name,
            "decoder": spec,
            "count": len(prompts.ids),
            "tokens": tokens,
            "forwards": forwards,
        }
        row["tokens_per_forward"] = round(tokens / forwards, 3)
        if prompts.problems is not None:
            row["exact_match"] = round(correct / len(prompts.ids), 4)
        if accepted:
            row["tau"] = round(1 + sum(accepted) / len(accepted), 3)
            row["acceptance_histogram"] = [accepted.count(length) for length in range(max(accepted) + 1)]
        yield row
