"""What a masked block drafts: each token from its own row alone, or corrected by the token before it.

Shapes: B sequences, M drafts of each, V vocabulary, C candidates of a row. Any distribution may draft, as long as it is
the one that is tested; so of the logits processors only those are asked that look at nothing but logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decoding.sampling import LogitsPipeline, inverse_cdf
from sbd.selector import DraftSelector, draft_selector

CANDIDATES = 16  # of a row: in DFlash2 the right token is among them 99.5 % of the time
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidates:
    """The distributions that drafts were drawn from one after the other: ``probabilities`` [M, C] of tokens ``ids`` [M, C].

    Those of draft j hold given the drafts before it, the ones that were drawn. All other tokens have probability 0.
    """

    ids: Tensor
    probabilities: Tensor

    def __getitem__(self, rows: slice) -> "Candidates":
        return Candidates(self.ids[rows], self.probabilities[rows])

    def spread(self, vocab_size: int) -> Tensor:
        """[M, V]."""
        spread = self.probabilities.new_zeros(len(self.ids), vocab_size)
        return spread.scatter_(1, self.ids, self.probabilities)


@dataclass(frozen=True)
class Drawn:
    """``tokens`` and ``confidences`` [B, M], from the states ``hidden`` [B, M, D].

    ids, probabilities: [B, M, C] where tokens depend on each other, of the candidates.
    """

    tokens: Tensor
    confidences: Tensor
    hidden: Tensor
    ids: Tensor | None = None
    probabilities: Tensor | None = None

    def drawn_from(self, index: int) -> tuple[Tensor, None] | tuple[None, Candidates]:
        """What gives the distributions of one sequence's drafts: states [M, D], or those of candidates themselves."""
        if self.ids is None or self.probabilities is None:
            return self.hidden[index], None
        return None, Candidates(self.ids[index], self.probabilities[index])


def draw_independent(pipeline: LogitsPipeline, head: Head, hidden: Tensor, uniform: Tensor | None) -> Drawn:
    """Draft from states [B, M, D], each row by itself; ``uniform`` [B, M] in [0, 1), None for the likeliest tokens."""
    shape = hidden.shape[:2]
    scores = pipeline.process(head(hidden.flatten(0, 1)))
    probabilities = scores.softmax(-1)
    tokens = scores.argmax(-1) if uniform is None else inverse_cdf(probabilities, uniform.flatten())
    return Drawn(tokens.view(shape), probabilities.amax(-1).view(shape), hidden)


@dataclass(frozen=True)
class DependentDrafter:
    """Drafts that a selector makes depend on each other, from the ``count`` likeliest candidates of each row.

    The corrections of every candidate by every candidate before it are computed at once; what is left to do in turn is to
    walk through them.
    """

    selector: DraftSelector
    embedding: nn.Module
    head_weight: Tensor
    count: int

    @classmethod
    def of_model(cls, model: PreTrainedModel, count: int | None) -> "DependentDrafter | None":
        """That of the model's selector; None if it has none, or if ``count`` is 0."""
        selector = draft_selector(model)
        if selector is None or count == 0:
            return None
        head_weight = model.get_output_embeddings().weight
        return cls(selector, model.get_input_embeddings(), head_weight, CANDIDATES if count is None else count)

    @torch.no_grad()
    def draw(
        self, pipeline: LogitsPipeline, head: Head, hidden: Tensor, before: Tensor, uniform: Tensor | None
    ) -> Drawn:
        """Draft behind the tokens ``before`` [B] from states [B, M, D]; ``uniform`` as in :func:`draw_independent`."""
        b, m, width = hidden.shape
        own = pipeline.rule_out(head(hidden.flatten(0, 1)))
        values, ids = own.topk(min(self.count, own.shape[-1]), dim=-1)  # [B * M, C]
        c = ids.shape[-1]
        ids = ids.view(b, m, c)
        first = before.clamp_min(0)[:, None, None].expand(b, 1, c)  # below 0 where none could be chosen
        previous = torch.cat([first, ids[:, :-1]], dim=1).flatten(0, 1)  # [B * M, P], P = C
        embedded = self.embedding(previous)
        added = self.selector.between(hidden.flatten(0, 1), embedded, self.head_weight[ids.flatten(0, 1)])
        scores = pipeline.process_values((values[:, None] + added.float()).flatten(0, 1))
        probabilities = scores.softmax(-1)  # [B * M * P, C]
        if uniform is None:
            chosen = scores.argmax(-1)
        else:
            chosen = inverse_cdf(probabilities, uniform.flatten().repeat_interleave(c)).clamp_min(0)
        # Which choices come true: from the left, each is made given the one before it.
        chosen, place = chosen.view(b, m, c), torch.zeros(b, 1, dtype=torch.long, device=hidden.device)
        given, taken = [], []
        for j in range(m):
            given.append(place)
            place = chosen[:, j].gather(1, place)
            taken.append(place)
        at = torch.cat(given, dim=1)[..., None, None].expand(b, m, 1, c)
        probabilities = probabilities.view(b, m, c, c).gather(2, at).squeeze(2)
        tokens = ids.gather(2, torch.cat(taken, dim=1)[..., None]).squeeze(2)
        return Drawn(tokens, probabilities.amax(-1), hidden, ids, probabilities)
