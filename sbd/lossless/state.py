"""What self-speculation remembers of a sequence between forwards, and what it learns of its draft sources on the way."""

from dataclasses import dataclass, field

from decoding.batch import Sequence
from decoding.sampling import UniformStream
from sbd.lossless.drafts import Draft, DraftSource
from sbd.lossless.planner import Planner


@dataclass
class SpeculativeState:
    """What one sequence remembers: its draft sources and random numbers, and what the running forward holds for it.

    draft: what is being verified. checked: the causal rows of the last token and of the drafts behind it. blocks: the
    rows of the look-ahead block for each acceptance length that is provided for. watched: for each source but the mask
    rows its last proposal, and where in the text that was.
    """

    sources: list[DraftSource]
    uniforms: UniformStream
    vocab_size: int
    draft: Draft = field(default_factory=Draft)
    checked: range = range(0)
    blocks: dict[int, range] = field(default_factory=dict)
    watched: dict[str, tuple[Draft, int]] = field(default_factory=dict)

    def possible(self, tokens: list[int]) -> int:
        """How many of a source's proposals can be run: up to the first that is no token of the model's."""
        return next((i for i, token in enumerate(tokens) if not 0 <= token < self.vocab_size), len(tokens))

    def watch(self, planner: Planner, sequence: Sequence, found: Draft) -> None:
        """Learn what a source is worth from the text itself, whether its drafts were verified or not.

        Else a planner that once gave up on lookup would not see that the text has begun to repeat itself.
        """
        if found.source in self.watched:
            draft, start = self.watched[found.source]
            came = sequence.tokens[start:]
            right = next(
                (i for i, pair in enumerate(zip(draft.tokens, came, strict=False)) if pair[0] != pair[1]), None
            )
            if right is None and len(came) < len(draft.tokens):
                return
            planner.record(sequence, draft, len(draft.tokens) if right is None else right)
            del self.watched[found.source]
        if found.tokens:
            self.watched[found.source] = found, len(sequence.tokens)
