"""How far a trained previous-token distribution is from the exact one, which Bayes' rule gives at one forward row
per vocabulary entry.

The distribution of x_i given the text before it and x_{i+1} follows from the next-token distribution alone: it is
proportional to p(x_i | before) p(x_{i+1} | before, x_i). Resampling from it would leave the distribution of samples as it is.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from decoding import Engine
from decoding.forward.rows import RowList
from rpt.config import ResampleConfig
from rpt.previous_rows import add_previous_rows

WITHIN = 128  # longer contexts cost more and tell the same
AT_ONCE = 512  # entries of the vocabulary in one forward


@torch.no_grad()
def measure_exactness(model, documents: Sequence[Sequence[int]], count: int, seed: int = 0) -> dict[str, float]:
    """Means in nats over ``count`` tokens drawn from the first WITHIN of each of ``documents`` (token ids).

    ``exact_loss`` and ``trained_loss`` of the token that stands there; ``exact_entropy``, what a draw from the exact
    distribution costs under that distribution, and ``drawn_cost``, what a draw from the trained distribution costs under it.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens = list(draw.choice(documents))[:WITHIN]
        i = draw.randrange(1, len(tokens) - 1)
        exact, trained = exact_distribution(model, tokens, i), trained_distribution(model, tokens, i)
        rows.append([-exact[tokens[i]], -trained[tokens[i]], -(exact.exp() @ exact), -(trained.exp() @ exact)])
    means = torch.tensor(rows).mean(0).tolist()
    names = ("exact_loss", "trained_loss", "exact_entropy", "drawn_cost")
    return {"exact_tokens": count} | {name: round(value, 4) for name, value in zip(names, means, strict=True)}


def exact_distribution(model, tokens: Sequence[int], i: int) -> Tensor:
    """Log-probabilities [V] of token i given those before it and token i + 1, by Bayes' rule from the next-token
    distribution.
    """
    before = torch.tensor(tokens[:i], device=model.device)
    distribution = _next_distributions(model, before[None])[0]
    after = [
        _next_distributions(model, torch.cat([before.expand(len(chosen), -1), chosen[:, None]], 1))[:, tokens[i + 1]]
        for chosen in torch.arange(len(distribution), device=model.device).split(AT_ONCE)
    ]
    return (distribution + torch.cat(after)).log_softmax(-1).cpu()


def _next_distributions(model, texts: Tensor) -> Tensor:
    """Log-probabilities [B, V] of the token after each of ``texts`` [B, L]."""
    return model(input_ids=texts, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)


def trained_distribution(model, tokens: Sequence[int], i: int) -> Tensor:
    """The same by the model's previous-token rows, in one forward."""
    config, rows = ResampleConfig.from_config(model.config), RowList()
    rows.add_causal(tokens[:i], 0)
    added = add_previous_rows(rows, tokens, i, 2, config, i, config.prev_target == "follow")
    engine = Engine(model)
    step = engine.step([rows], engine.new_cache(1))
    return step.logits([(0, added[-1:])])[0].log_softmax(-1).cpu()
