"""What can be said about samples: their likelihood under a next-token model, unigram entropy, MAUVE.

All in nats but the unigram entropy, which is in bits.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

WARNING = (
    "Generative perplexity falls with low temperature, truncated noise and repetition, and samplers without a model reach "
    "good values: read it beside unigram entropy and the likelihood bound, never alone (arXiv 2409.02908, 2606.08417)."
)


def judge_samples(judge, samples: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Generative perplexity, unigram entropy and MAUVE of whole rows, whose first token was given."""
    return {
        **generative_perplexity(judged_nats(judge, samples, [1] * len(samples))),
        "unigram_entropy_bits": unigram_entropy(samples),
        "mauve": mauve(judge, samples, references),
    }


@torch.no_grad()
def judged_nats(judge, texts: Sequence[Sequence[int]], given: Sequence[int]) -> list[Tensor]:
    """-log p of each token behind the first ``given`` ones of each text, by the next-token distribution of ``judge``."""
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
