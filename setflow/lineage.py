"""The particles of a steered run for people: which particle decided what, what each weighs, and who became whose copy."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.text import Text

from setflow.text import COLOURS, split_text
from setflow.trace import parts, picture_of

if TYPE_CHECKING:
    from steering import Judgement, SteeredOutput


def particle_tokens(output: "SteeredOutput", prompt_length: int) -> list[list[int]]:
    """The new tokens of every particle of the first prompt."""
    counts = output.particle_tokens[0].tolist()
    rows = output.particles[0, :, prompt_length:].tolist()
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


def steering_line(output: "SteeredOutput") -> str:
    """What became of the particles of the first prompt, in a line."""
    judgements = output.judgements[0]
    resampled = sum(judgement.ancestors is not None for judgement in judgements)
    count = output.particles.shape[1]
    state = (
        "all ruled out" if output.exhausted[0] else f"effective sample size {_ess(judgements, count):.1f} at the end"
    )
    return (
        f"{count} particles ({output.particle_forwards[0]} forwards of one sequence): {state}, resampled {resampled} times, "
        f"log normaliser {output.log_normaliser[0]:.3f}; target {output.target}"
    )


def steering_report(output: "SteeredOutput", tokenizer, prompt_length: int) -> dict[str, Any]:
    """The same with every particle, for JSON."""
    rewards = [None] * output.particles.shape[1] if output.rewards is None else output.rewards[0].tolist()
    tokens, weights = particle_tokens(output, prompt_length), output.log_weights[0].tolist()
    return {
        "target": output.target,
        "log_normaliser": _finite(float(output.log_normaliser[0])),
        "exhausted": bool(output.exhausted[0]),
        "chosen": int(output.chosen[0]),
        "particle_forwards": int(output.particle_forwards[0]),
        "particles": [
            {
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "log_weight": _finite(weight),
                "reward": None if reward is None else _finite(reward),
            }
            for ids, weight, reward in zip(tokens, weights, rewards, strict=True)
        ],
        "judgements": [
            {"tokens": j.tokens, "ess": round(j.ess, 4), "ancestors": j.ancestors} for j in output.judgements[0]
        ],
    }


def lineage_lines(output: "SteeredOutput", tokenizer, prompt_length: int, width: int) -> Iterator[Text]:
    """A line for each particle, in the colours of the particles that decided its tokens: equal colours, equal ancestors.

    Numbers stand before each line, the weight in per cent behind the number; the chosen particle is bold.
    """
    texts = particle_tokens(output, prompt_length)
    weights = output.log_weights[0].exp().tolist()
    chosen, digits = int(output.chosen[0]), len(str(len(texts) - 1))
    gutter = digits + 7
    pieces = [[picture_of(piece) for piece in split_text(tokenizer, ids)] for ids in texts]
    cut = [list(parts(row, width - gutter)) for row in pieces]
    for number in range(max(map(len, cut))):
        for place, row in enumerate(cut):
            if number >= len(row):
                continue
            line = Text(f"{place:>{digits}} {100 * weights[place]:>3.0f}%  ", style="dim")
            for i, piece in row[number]:
                colour = COLOURS[output.origins[0][place][i] % len(COLOURS)]
                line.append(piece, style=f"bold {colour}" if place == chosen else colour)
            yield line
        yield Text()
    for judgement in output.judgements[0]:
        whose = "" if judgement.ancestors is None else f", copies of {' '.join(map(str, judgement.ancestors))}"
        yield Text(f"{judgement.tokens} tokens: effective sample size {judgement.ess:.1f}{whose}", style="dim")


def _ess(judgements: "list[Judgement]", count: int) -> float:
    return judgements[-1].ess if judgements else count


def _finite(value: float) -> float | None:
    """JSON has no infinities: None stands for -inf."""
    return value if math.isfinite(value) else None
