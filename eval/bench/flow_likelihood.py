"""Likelihood bounds of a flow-matching model on held-out rows (ELBO), and what can be said about its own samples.

Shapes: N rows, L tokens, V vocabulary. All in nats but the unigram entropy, which is in bits.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dfm.draws import Draws
from dfm.flow_config import FlowTraits
from dfm.networks import Bidirectional
from dfm.paths.mixture import MixturePath
from dfm.paths.schedulers import PowerScheduler
from dfm.rates.conditional import ReversalVelocity
from dfm.rates.losses import generalised_kl, rate_bound, stratified_times

WARNING = (
    "Generative perplexity falls with low temperature, truncated noise and repetition, and samplers without a model reach "
    "good values: read it beside unigram entropy and the likelihood bound, never alone (arXiv 2409.02908, 2606.08417)."
)


@torch.no_grad()
def likelihood_bound(
    model,
    rows: Tensor,
    times: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Upper bounds on -log p per token of whole rows [N, L], their first token given.

    ``times`` noise levels in all, stratified and uniform in kappa. Of the forward rates; for a uniform source also of the
    reversal rates, whose bound is tighter, so that only that one may be compared with a mask model's. ``advance`` is
    called for each batch. ValueError for a model that was trained with blocks.
    """
    traits = FlowTraits.of(model.config)
    if getattr(model.config, "flow", None) is None or traits.block_sizes is not None:
        raise ValueError("model must be one that was trained with the dfm objective on whole texts")
    source = traits.make_source(
        model.get_input_embeddings().num_embeddings, getattr(model.generation_config, "mask_token_id", None)
    )
    # With kappa = t times are levels; the bound is the same for every scheduler.
    path = MixturePath(source, PowerScheduler())
    reversal = ReversalVelocity(path) if source.mask_id is None else None
    generator = torch.Generator().manual_seed(seed)
    each = max(1, times // len(rows))
    levels = torch.stack([stratified_times(each, generator, 1.0) for _ in rows])
    bounds = {"forward": torch.zeros(len(rows)), "reversal": torch.zeros(len(rows))}
    given = torch.arange(rows.shape[1]) == 0
    for i, start in _batches(len(rows), each, batch_size):
        x1, t = rows[i].expand(min(batch_size, each - start), -1), levels[i, start : start + batch_size]
        noise = torch.rand(x1.shape, generator=generator, dtype=torch.float64) >= t[:, None]
        z = torch.where(noise & ~given, source.sample(x1, Draws([generator] * len(x1))), x1)
        network = Bidirectional(model, torch.ones_like(z, dtype=torch.bool), traits, path.scheduler)
        logits = network(z, t, given.expand_as(z))
        if source.mask_id is not None:
            logits[..., source.mask_id] = -torch.inf
            loss = torch.where(noise, generalised_kl(logits, z, x1, t, path), 0)
        else:
            loss = generalised_kl(logits, z, x1, t, path)
            p1 = logits.softmax(-1)
            tight = rate_bound(reversal.at(z, x1, t).to(p1), reversal.marginal(z, t, p1), z)
            bounds["reversal"][i] += tight[:, ~given].sum() / each
        bounds["forward"][i] += loss[:, ~given].sum() / each
        advance()
    count = rows.shape[1] - 1
    kinds = ["forward"] if reversal is None else ["forward", "reversal"]
    result: dict[str, Any] = {"source": traits.source, "rows": len(rows), "times": each * len(rows)}
    for kind in kinds:
        per_token = bounds[kind] / count
        result[f"{kind}_bound_nats"] = round(per_token.mean().item(), 4)
        result[f"{kind}_bound_error"] = round(per_token.std().item() / math.sqrt(len(rows)), 4)
        result[f"{kind}_elbo_perplexity"] = round(per_token.mean().exp().item(), 3)
    return result


def bound_batches(rows: int, times: int, batch_size: int) -> int:
    """How many batches :func:`likelihood_bound` runs."""
    return len(list(_batches(rows, max(1, times // rows), batch_size)))


def _batches(rows: int, each: int, batch_size: int):
    return ((i, start) for i in range(rows) for start in range(0, each, batch_size))


@torch.no_grad()
def judged_nats(judge, texts: Sequence[Sequence[int]], given: Sequence[int]) -> list[Tensor]:
    """-log p of each token behind the first ``given`` ones of each text, by the next-token law of ``judge``."""
    nats = []
    for text, start in zip(texts, given, strict=True):
        ids = torch.tensor([text], device=judge.device)
        first = max(1, start)
        logits = judge(input_ids=ids).logits[0, first - 1 : -1].float()
        nats.append(cross_entropy(logits, ids[0, first:], reduction="none").cpu())
    return nats


def generative_perplexity(nats: Sequence[Tensor]) -> dict[str, float | None]:
    """Of samples' tokens: the mean over samples of exp(mean), and exp of the mean over all tokens."""
    nats = [tokens for tokens in nats if len(tokens)]
    if not nats:
        return {"generative_perplexity": None, "corpus_generative_perplexity": None}
    return {
        "generative_perplexity": round(torch.stack([tokens.mean().exp() for tokens in nats]).mean().item(), 3),
        "corpus_generative_perplexity": round(torch.cat(nats).mean().exp().item(), 3),
    }


def unigram_entropy(samples: Sequence[Sequence[int]]) -> float:
    """Entropy in bits of the tokens of a sample, mean over samples.

    >>> unigram_entropy([[5, 5, 5, 5], [1, 2, 3, 4]])
    1.0
    """
    total = 0.0
    for sample in samples:
        shares = [list(sample).count(token) / len(sample) for token in set(sample)]
        total -= sum(share * math.log2(share) for share in shares)
    return round(total / max(1, len(samples)), 4)


@torch.no_grad()
def mauve(judge, samples: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float | None:
    """MAUVE (arXiv 2102.01454) of samples against references from the last hidden states of ``judge``.

    None where the package mauve-text is not installed.
    """
    if importlib.util.find_spec("mauve") is None:
        return None
    from mauve import compute_mauve

    def features(texts):
        trunk = judge.get_decoder()
        ids = [torch.tensor([list(text)], device=judge.device) for text in texts]
        return torch.cat([trunk(input_ids=one).last_hidden_state[:, -1].float().cpu() for one in ids]).numpy()

    return round(float(compute_mauve(p_features=features(references), q_features=features(samples)).mauve), 4)
