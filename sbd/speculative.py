"""Lossless self-speculation: draft with the mask rows, verify with the causal rows of the same forward.

The forward that runs drafted tokens as causal rows computes their next-token laws on the way, so the same weights check
what they drafted: the text is word for word (greedy) or in law (sampled) that of the model's next-token mode. Row layout
of one forward, for a sequence whose next position is t and whose last token z is pending:

    [ z | drafts d_1 .. d_M at t .. t+M-1, causal | for each provided acceptance length a: k masks from t+a on ]

A look-ahead block sees the past, z and d_1 .. d_a. If a drafts are accepted, row a of the causal part gives the token
that follows them, and masks 1 .. k-1 of block a have already drafted what comes next.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from decoding.batch import Batch, Sequence
from decoding.checks import check_choice, check_count
from decoding.decoder import Decoder
from decoding.forward.model import RowLogits
from decoding.forward.rows import RowList
from decoding.sampling import TokenLaw
from sbd.auto import AutoPlanner
from sbd.decoder import warn_untrained_size
from sbd.lookup import PromptLookup
from sbd.planner import Draft, Planner
from sbd.verification import verify_greedy, verify_sampled

DRAFTS = ("mask", "prompt_lookup", "both")
LOOKUP_CONFIDENCE = (0.0, 0.3, 0.5, 0.7)  # first guess for runs of 0 to 3 tokens, soon replaced by what is seen


@dataclass
class SpeculativeState:
    """What one sequence remembers: its draft, and the acceptance lengths that the running forward provides for.

    watched: a draft that was looked up for the place ``watched_from``, until the text shows how much of it is right.
    """

    draft: Draft = field(default_factory=Draft)
    provided: tuple[int, ...] = ()
    lookup: PromptLookup | None = None
    watched: Draft | None = None
    watched_from: int = 0

    def watch(self, planner: Planner, text: SequenceOf[int], found: Draft) -> None:
        """Learn what lookup is worth from the text itself, whether its drafts were verified or not.

        Else a planner that once gave up on lookup would not see that the text has begun to repeat itself.
        """
        if self.watched is not None:
            said, came = self.watched.tokens, text[self.watched_from :]
            right = next((i for i, pair in enumerate(zip(said, came, strict=False)) if pair[0] != pair[1]), None)
            if right is None and len(came) < len(said):
                return
            planner.record(self.watched, len(said) if right is None else right)
        self.watched, self.watched_from = (found if found.tokens else None), len(text)


@dataclass(frozen=True)
class SelfSpeculativeDecoder(Decoder):
    """The model's own text, several tokens per forward.

    block_size: masks in a look-ahead block, so at most block_size - 1 drafts are verified at once.
    look_ahead: for which acceptance lengths the next draft is prepared in the same forward: "all"; "alternate", so drafting
        and verifying take turns; 0, only for all drafts being accepted; a number, that many of the likeliest; "auto",
        the number of drafts and blocks that pays best, from the measured cost of rows on this machine and the running
        acceptance, down to plain next-token rows where drafting does not pay.
    draft: where drafts come from: "mask" rows, "prompt_lookup" (what followed the last tokens when they occurred
        before; needs no mask token and no training), or "both": whichever promises more accepted tokens.
    mask_token_id: by default the one that the model's generation config names.

    Greedy text equals ``model.generate(do_sample=False)`` up to floating-point ties. Sampled text has the same law, not
    the same draws. It is the law of the weights in use: full fine-tuning moves it, an adapter on mask rows does not.
    """

    block_size: int = 8
    look_ahead: Literal["all", "alternate", "auto"] | int = "all"
    draft: Literal["mask", "prompt_lookup", "both"] = "mask"
    mask_token_id: int | None = None

    gives_logprobs = True

    def __post_init__(self):
        check_count("block_size", self.block_size, 2)
        check_choice("draft", self.draft, DRAFTS)
        if isinstance(self.look_ahead, str):
            check_choice("look_ahead", self.look_ahead, ("all", "alternate", "auto"))
        else:
            check_count("look_ahead", self.look_ahead, 0, self.block_size)

    @property
    def needs_mask_token(self) -> bool:
        return self.draft != "prompt_lookup"

    @property
    def most_rows(self) -> int | None:
        return self.block_size * (self.block_size + 1) if self.look_ahead == "auto" else None

    def check(self, model, law: TokenLaw) -> None:
        if self.needs_mask_token:
            warn_untrained_size(model, self.block_size)

    def begin(self, batch: Batch) -> None:
        if self.look_ahead == "auto":
            batch.state = AutoPlanner(self.block_size, self.needs_mask_token, batch.row_costs)
        else:
            batch.state = Planner(self.block_size, self.look_ahead, self.needs_mask_token)
        for sequence in batch.sequences:
            sequence.state = SpeculativeState(lookup=None if self.draft == "mask" else PromptLookup())

    def plan(self, batch: Batch) -> list[RowList]:
        lists = []
        for sequence in batch.unfinished:
            state: SpeculativeState = sequence.state
            self._look_up(batch.state, sequence)
            drafts, provided = batch.state.choose(sequence, state.draft)
            state.draft = state.draft.shortened(drafts)
            # A block pays only if, after a drafts and the token behind them, two more tokens are wanted.
            state.provided = tuple(a for a in provided if sequence.room - (a + 1) >= 2)
            rows, t = RowList(), len(sequence.tokens)
            rows.add_causal(sequence.pending + state.draft.tokens, sequence.cached)
            masks, slot = [batch.mask_token_id] * self.block_size, t + drafts
            for a in state.provided:
                rows.add_block(masks, t + a, slot)
                slot += self.block_size
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, logits: RowLogits) -> None:
        sequences = batch.unfinished
        causal_rows = [len(s.pending) + len(s.state.draft.tokens) for s in sequences]
        accepted = self._verify(batch, logits, sequences)
        self._draft_again(batch, logits, sequences, causal_rows, accepted)

    def preview(self, batch: Batch) -> list[int] | None:
        sequence = batch.sequences[0]
        return list(sequence.state.draft.tokens) if sequence.state else None

    def _look_up(self, planner: Planner, sequence: Sequence) -> None:
        """Replace the draft by one from the text where that promises more accepted tokens.

        The promise of a mask draft depends on its laws and not on its values, as the ratio test asks.
        """
        state: SpeculativeState = sequence.state
        if state.lookup is not None:
            found, length = state.lookup.draft(sequence.tokens, self.block_size - 1)
            draft = Draft(found, [LOOKUP_CONFIDENCE[length]] * len(found), kind="lookup")
            state.watch(planner, sequence.tokens, draft)
            if planner.expected(draft) > planner.expected(state.draft):
                state.draft = draft

    def _verify(self, batch: Batch, logits: RowLogits, sequences: list[Sequence]) -> list[int]:
        """Accept drafts, commit them and the token behind them; returns how many drafts of each sequence passed."""
        counts = [1 + len(s.state.draft.tokens) for s in sequences]
        places = [i for i, count in enumerate(counts) for _ in range(count)]
        offsets = [j for count in counts for j in range(count)]
        pending = [len(s.pending) for s in sequences]
        raw = logits(places, [pending[i] - 1 + j for i, j in zip(places, offsets, strict=True)])
        log_p = raw.log_softmax(-1) if batch.wants_logprobs else None

        def left_of(row: int) -> tuple[int, list[int]]:
            sequence = sequences[places[row]]
            return sequence.left_of(sequence.state.draft.tokens[: offsets[row]])

        scores = batch.law.scores(raw, left_of)
        likeliest = None if batch.law.do_sample else scores.argmax(-1).tolist()
        lengths, start = [], 0
        for sequence, count in zip(sequences, counts, strict=True):
            draft, rows = sequence.state.draft, slice(start, start + count)
            if likeliest is not None:
                accepted, token = verify_greedy(likeliest[rows], draft.tokens)
            else:
                laws = None if draft.hidden is None else batch.law.scores(logits.of(draft.hidden))
                accepted, token = verify_sampled(scores[rows], draft.tokens, laws, sequence.generator)
            emitted = [*draft.tokens[:accepted], token]
            logprobs = None if log_p is None else log_p[rows][range(accepted + 1), emitted].tolist()
            sequence.cached = len(sequence.tokens) + accepted
            batch.commit(sequence, emitted, logprobs=logprobs)
            sequence.cached = min(sequence.cached, len(sequence.tokens))
            if draft.tokens:
                if draft.kind == "mask":  # what was looked up is watched anyway
                    batch.state.record(draft, accepted)
                sequence.acceptance_lengths.append(accepted)
            lengths.append(accepted)
            start += count
        return lengths

    def _draft_again(
        self, batch: Batch, logits: RowLogits, sequences: list[Sequence], causal_rows: list[int], accepted: list[int]
    ) -> None:
        """Take the next drafts from the look-ahead block of the acceptance length that came true, if there is one.

        The block's first mask stands where the token behind the accepted drafts went, so it drafts nothing.
        """
        drafting, rows = [], []
        for place, (sequence, length) in enumerate(zip(sequences, accepted, strict=True)):
            provided, sequence.state.draft = sequence.state.provided, Draft()
            if not sequence.finished and length in provided:
                drafting.append(place)
                rows.append(causal_rows[place] + provided.index(length) * self.block_size)
        if not drafting:
            return
        count = self.block_size - 1
        places = [place for place in drafting for _ in range(count)]
        hidden = logits.hidden_of(places, [row + j for row in rows for j in range(1, self.block_size)])
        # Only processors that look at nothing but logits: any law may draft, as long as it is the one that is tested.
        scores = batch.law.scores(logits.of(hidden))
        tokens = batch.law.choose(scores, [sequences[place].generator for place in places]).view(-1, count).tolist()
        confidences = scores.softmax(-1).amax(-1).view(-1, count).tolist()
        for i, place in enumerate(drafting):
            laws = hidden[i * count : (i + 1) * count] if batch.law.do_sample else None
            sequences[place].state.draft = Draft(tokens[i], confidences[i], laws)
