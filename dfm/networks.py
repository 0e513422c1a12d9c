"""A causal language model as the posterior network of whole texts: every row sees every other."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from decoding.batch import UndecidableToken
from decoding.forward.attention import run_trunk
from decoding.forward.noise_level import noise_levels, transition_levels, with_noise_level
from decoding.forward.visibility import Visibility
from decoding.sampling import likeliest
from dfm.flow_config import FlowTraits
from dfm.paths.schedulers import Scheduler


@dataclass(frozen=True)
class Bidirectional:
    """A :class:`dfm.rates.posterior.PosteriorModel` without cache: no exact one exists, since all rows see all tokens.

    real: [B, L] bool, False at padding, which may lie on any side and is never seen; positions count real tokens.
    scheduler: gives the share of data that a model with a noise level is told; the mask source needs none.
    """

    model: PreTrainedModel
    real: Tensor
    traits: FlowTraits
    scheduler: Scheduler

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: Tensor, frozen: Tensor, until: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Logits [B, L, V] of the clean token of each position; -inf for ids that are no tokens.

        until, noise: the step that a model of transitions is told, as in a Query.
        Raises UndecidableToken for a position that is not ``frozen`` and has nothing to choose from.
        """
        if self.traits.shift and not bool(frozen[:, 0].all()):
            raise ValueError("the first position must be fixed: this model predicts a token from the row before it")
        levels = noise_levels(self.scheduler.kappa(t), frozen)
        if until is not None and noise is not None:
            levels = transition_levels(levels, self.scheduler.kappa(until)[:, None], noise)
        hidden = run_trunk(
            self.model,
            x,
            (self.real.long().cumsum(-1) - 1).clamp_min(0),
            self.visibility(),
            x.shape[1],
            embeddings=with_noise_level(self.model, x, levels),
        )
        logits = self.model.get_output_embeddings()(hidden).float()
        logits[..., list(self.traits.excluded)] = -torch.inf
        logits = logits.roll(1, dims=1) if self.traits.shift else logits
        for index, position in ((likeliest(logits) < 0) & ~frozen).nonzero().tolist():
            raise UndecidableToken(index, position)
        return logits

    def visibility(self) -> Visibility:
        """Real rows see the span of real tokens, padding itself; ValueError if padding lies between tokens."""
        index = torch.arange(self.real.shape[1], device=self.real.device).expand_as(self.real)
        count = self.real.sum(-1, keepdim=True)
        start = self.real.long().argmax(-1, keepdim=True)
        if not torch.equal(self.real, (index >= start) & (index < start + count)):
            raise ValueError("attention_mask must be 1 on one run of tokens, without padding between them")
        nothing = torch.zeros_like(index)
        own_start = torch.where(self.real, start, index)
        own_end = torch.where(self.real, start + count, index + 1)
        return Visibility(nothing, nothing, own_start, own_end, index)
