"""When a sequence ends: EOS, stop strings, any StoppingCriteria and the token limit, exact inside a block.

Several tokens are committed at once, so each criterion is asked about every prefix in turn and the text is cut at the
first that stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria


@dataclass(frozen=True)
class Stopping:
    """``eos_token_ids`` end a sequence and belong to it; ``criteria`` are asked about each new prefix."""

    eos_token_ids: frozenset[int] = frozenset()
    criteria: tuple[StoppingCriteria, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, config: GenerationConfig, criteria: StoppingCriteriaList | None, device: torch.device) -> "Stopping":
        """What ``generate`` prepared. Its EOS and length criteria are counted here rather than asked.

        A user's own criterion of either kind counts too, as it does in transformers.
        """
        given = [c.eos_token_id.flatten().tolist() for c in criteria or () if type(c) is EosTokenCriteria]
        eos = [] if config.eos_token_id is None else config.eos_token_id
        ids = frozenset(sum(given, []) if given else [eos] if isinstance(eos, int) else eos)
        asked = []
        for criterion in criteria or ():
            is_limit = type(criterion) is MaxLengthCriteria and criterion.max_length == config.max_length
            if not is_limit and type(criterion) is not EosTokenCriteria:
                asked.append(criterion)
        return cls(ids, tuple(asked), device)

    def cut(self, tokens: Sequence[int], new_tokens: Sequence[int]) -> int | None:
        """How many of ``new_tokens`` are left when they follow ``tokens``, or None if nothing stops."""
        for count, token in enumerate(new_tokens, 1):
            if token in self.eos_token_ids:
                return count
            if self.criteria:
                prefix = torch.tensor([[*tokens, *new_tokens[:count]]], device=self.device)
                if any(torch.as_tensor(criterion(prefix, None)).all() for criterion in self.criteria):
                    return count
        return None
