"""Wall clock, every contender on every prompt in turn, as a ratio to stock ``model.generate`` in the same run."""

import random
import statistics
from collections.abc import Sequence
from typing import Any

from eval.bench.contenders import Contender
from eval.bench.prompts import PromptSet


def measure_speed(
    contenders: Sequence[Contender], prompts: PromptSet, rounds: int = 3, progress=lambda: None
) -> list[dict[str, Any]]:
    """Rows with tokens per second and its ratio to the first contender, batch 1.

    Each round runs all prompts; within a prompt the contenders take turns in an order drawn anew, so that a slow moment of
    the machine hits all alike and none always follows the same other. Figures are medians over rounds of a round's
    totals. The first prompt is run once before, to warm up. ``overhead_share`` is the part of the time spent outside the
    model's trunk and head, ``overhead_milliseconds_per_forward`` that time itself.
    """
    for contender in contenders:
        contender.run(prompts.ids[:1], prompts.max_new_tokens)
    totals, order = {contender.name: [] for contender in contenders}, random.Random(0)
    for _ in range(rounds):
        sums = {contender.name: [0, 0, 0.0, 0.0] for contender in contenders}
        for ids in prompts.ids:
            for contender in order.sample(contenders, len(contenders)):
                sample = contender.run([ids], prompts.max_new_tokens)
                for place, value in enumerate((sample.tokens, sample.forwards, sample.seconds, sample.model_seconds)):
                    sums[contender.name][place] += value
            progress()
        for name, values in sums.items():
            totals[name].append(values)
    base = [seconds / tokens for tokens, _, seconds, _ in totals[contenders[0].name]]
    rows = []
    for name, runs in totals.items():
        tokens, forwards, _, _ = runs[-1]
        rows.append(
            {
                "prompts": prompts.name,
                "decoder": name,
                "count": len(prompts.ids),
                "new_tokens_per_prompt": round(tokens / len(prompts.ids), 1),
                "tokens_per_forward": round(tokens / forwards, 3),
                "tokens_per_second": round(statistics.median(tokens / seconds for tokens, _, seconds, _ in runs), 1),
                "speed_up": round(
                    statistics.median(
                        b / (seconds / tokens) for b, (tokens, _, seconds, _) in zip(base, runs, strict=True)
                    ),
                    3,
                ),
                "milliseconds_per_forward": round(statistics.median(1e3 * inside / f for _, f, _, inside in runs), 3),
                "overhead_milliseconds_per_forward": round(
                    statistics.median(1e3 * (seconds - inside) / f for _, f, seconds, inside in runs), 3
                ),
                "overhead_share": round(statistics.median(1 - inside / seconds for _, _, seconds, inside in runs), 3),
            }
        )
    return rows
