"""Lossless self-speculation: draft with the mask rows, verify with the causal rows of the same forward.

The forward that runs drafted tokens as causal rows computes their next-token distributions on the way, so the same
weights check what they drafted: the text is word for word (greedy) or in distribution (sampled) that of the model's
next-token mode. Row layout of one forward, for a sequence whose next position is t and whose last token z is pending:

    [ z | drafts d_1 .. d_M at t .. t+M-1, causal | for each provided acceptance length a: k masks from t+a on ]

A look-ahead block sees the past, z and d_1 .. d_a. If a drafts are accepted, row a of the causal part gives the token
that follows them, and masks 1 .. k-1 of block a have already drafted what comes next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from decoding.batch import Batch, Sequence
from decoding.decoder import Decoder
from decoding.engine import Engine, Step
from decoding.forward.model import warn_quantised_activations
from decoding.forward.rows import RowList
from decoding.forward.transfer import to_device
from decoding.inputs.checks import check_choice, check_count, check_named, warn_untrained_size
from decoding.sampling import LogitsPipeline, UniformStream, likeliest, of_tokens
from decoding.verification import verify_greedy, verify_sampled
from sbd.lossless.auto_planner import AutoPlanner
from sbd.lossless.drafts import Draft, DraftSource, MaskDrafts, draft_sources
from sbd.lossless.drawing import DependentDrafter, Drawn, draw_independent
from sbd.lossless.planner import Planner
from sbd.lossless.rectangles import draft_distributions, rectangle
from sbd.lossless.state import SpeculativeState
from sbd.selector import draft_selector

DRAFTS = ("mask", "prompt_lookup", "both")
MOST_ROWS = 16_384  # in a forward; far from paying, but masks of attention grow with them


@dataclass(frozen=True)
class SelfSpeculativeDecoder(Decoder):
    """The model's own text, several tokens per forward.

    block_size: masks in a look-ahead block, so at most block_size - 1 drafts are verified at once. With look_ahead "all" or
        "auto" a forward has up to about block_size squared rows; more than 16,384 are refused.
    look_ahead: for which acceptance lengths the next draft is prepared in the same forward: "all"; "alternate", so drafting
        and verifying take turns; 0, only for all drafts being accepted; a number, that many of the likeliest; "auto",
        the number of drafts and blocks that pays best, from the measured cost of rows on this machine and the running
        acceptance, down to plain next-token rows where drafting does not pay.
    draft: where drafts come from: "mask" rows; "prompt_lookup", what followed the last tokens when they occurred before,
        which needs no mask token and no training; "both", whichever promises more accepted tokens; or a DraftSource of
        one's own (:mod:`sbd.lossless.drafts`), the class or "module:Class", with "mask+" before it for both.
    candidates: of each mask row, from which a selector (:mod:`sbd.selector`) chooses a draft that follows from the one
        before it; 0 leaves the model's selector aside, so that mask rows draft independently of each other. By default 16
        for a model that has a selector.
    mask_token_id: by default the one that the model's generation config names.

    Greedy text equals ``model.generate(do_sample=False)`` up to floating-point ties. Sampled text has the same
    distribution, not the same draws; with look_ahead="auto" the draws depend on the measured costs, so the same seed may
    give another text on another day. It is the distribution of the weights in use: full fine-tuning moves it, an adapter
    on mask rows does not.
    """

    block_size: int = 8
    look_ahead: Literal["all", "alternate", "auto"] | int = "all"
    draft: str | Callable[[], DraftSource] = "mask"
    candidates: int | None = None
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size, 2)
        check_named("draft", self.draft, DRAFTS)
        draft_sources(self.draft)  # what is named can be imported
        if self.candidates is not None:
            check_count("candidates", self.candidates, 0)
        if isinstance(self.look_ahead, str):
            check_choice("look_ahead", self.look_ahead, ("all", "alternate", "auto"))
        else:
            check_count("look_ahead", self.look_ahead, 0, self.block_size)

    @property
    def most_rows(self) -> int:
        """Rows of the longest forward: the pending token, the drafts, and a block for each length that is provided for."""
        every = self.block_size if self.look_ahead in ("all", "auto") else 1
        blocks = every if isinstance(self.look_ahead, str) else max(1, self.look_ahead)
        return self.block_size * (1 + (blocks if self.needs_mask_token else 0))

    @property
    def needs_mask_token(self) -> bool:
        return any(isinstance(make, type) and issubclass(make, MaskDrafts) for make in draft_sources(self.draft))

    @property
    def gives_logprobs(self) -> bool:
        return True

    @property
    def is_lossless(self) -> bool:
        return True

    def check(self, model: Any, pipeline: LogitsPipeline) -> None:
        pipeline.follow_drafts(type(self).__name__, model.config.get_text_config().vocab_size)
        if self.most_rows > MOST_ROWS:
            raise ValueError(
                f"block_size={self.block_size} with look_ahead={self.look_ahead!r} has forwards of {self.most_rows} rows, the "
                f"most are {MOST_ROWS}; choose smaller blocks, or a number for look_ahead"
            )
        warn_quantised_activations(model, type(self).__name__)
        if self.candidates and draft_selector(model) is None:
            raise ValueError(f"candidates must be 0 for a model without a draft selector, got {self.candidates}")
        if self.needs_mask_token:
            warn_untrained_size(model, self.block_size)

    def begin(self, batch: Batch, engine: Engine) -> None:
        shared = not batch.pipeline.do_sample
        if self.look_ahead == "auto":
            batch.state = AutoPlanner(self.block_size, self.needs_mask_token, engine, len(batch.sequences), shared)
        else:
            batch.state = Planner(self.block_size, self.look_ahead, self.needs_mask_token, shared)
        if self.needs_mask_token:
            batch.state.drafter = DependentDrafter.of_model(engine.model, self.candidates)
        for sequence in batch.sequences:
            self._start(sequence, engine)

    def fork(self, batch: Batch, sequence: Sequence, source: Sequence, engine: Engine) -> None:
        """Without the draft that ``source`` holds: copies that verified the same tokens would stay alike."""
        self._start(sequence, engine)

    def _start(self, sequence: Sequence, engine: Engine) -> None:
        sources = [make() for make in draft_sources(self.draft)]
        uniforms = UniformStream(sequence.generator)
        sequence.state = SpeculativeState(sources, uniforms, engine.model.config.vocab_size)

    def plan(self, batch: Batch) -> list[RowList]:
        lists = []
        for sequence in batch.unfinished:
            state: SpeculativeState = sequence.state
            proposed = self._best_draft(batch, sequence)
            drafts, provided = batch.state.choose(sequence, proposed)
            state.draft = proposed.shortened(drafts)
            rows, t = RowList(), len(sequence.tokens)
            causal = rows.add_causal(sequence.pending + state.draft.tokens, sequence.cached)
            state.checked = causal[len(sequence.pending) - 1 :]
            slot, state.blocks = t + drafts, {}
            for a in provided:
                # With less room nothing is left to draft behind a drafts and the token after them.
                if sequence.room - (a + 1) >= 2:
                    state.blocks[a] = rows.add_block(batch.masks(self.block_size), t + a, slot)
                    slot += self.block_size
            lists.append(rows)
        return lists

    def absorb(self, batch: Batch, step: Step) -> None:
        """Everything is decided on the device and copied to the host once."""
        sequences, states = step.sequences, [sequence.state for sequence in step.sequences]
        accepted, token, known = self._verify(batch, step)
        decided = [accepted[:, None], token[:, None]]
        drawn = self._draft(batch, step, accepted, token) if any(state.blocks for state in states) else None
        if drawn is not None:
            decided += [drawn.tokens, drawn.confidences]
        # In float32, which holds the ids of tokens below 2**24.
        table = torch.cat([*decided, *known.values()], dim=1).tolist()

        count = 0 if drawn is None else self.block_size - 1
        width = max(len(state.checked) for state in states)
        for i, (sequence, state, row) in enumerate(zip(sequences, states, table, strict=True)):
            length, drafts, confidences = int(row[0]), row[2 : 2 + count], row[2 + count : 2 + 2 * count]
            rest = row[2 + 2 * count :]
            logprobs = {name: rest[j * width : (j + 1) * width] for j, name in enumerate(known)}
            self._commit(batch, sequence, length, int(row[1]), logprobs)
            held = Draft()
            if length in state.blocks and not sequence.finished:
                state.uniforms.advance(count if batch.pipeline.do_sample else 0)
                held = Draft([int(draft) for draft in drafts], confidences)
                if drawn is not None and batch.pipeline.do_sample:
                    held.hidden, held.candidates = drawn.drawn_from(i)
                held = held.shortened(sum(c == c for c in confidences))  # where logits are nan, nothing was drafted
            for source in state.sources:
                if isinstance(source, MaskDrafts):
                    source.draft = held

    def preview(self, batch: Batch) -> list[int] | None:
        state = batch.sequences[0].state
        masks = [source.draft for source in state.sources if isinstance(source, MaskDrafts)] if state else []
        return list(masks[0].tokens) if masks else None

    def _best_draft(self, batch: Batch, sequence: Sequence) -> Draft:
        """The proposal with the most expected acceptances; the first of equals.

        What is expected of a mask draft depends on its distributions and never on the tokens drawn from them: else the
        accept/reject test would be biased.
        """
        state, planner, best = sequence.state, batch.state, None
        for source in state.sources:
            found = source.propose(sequence.tokens, self.block_size - 1)
            if not isinstance(source, MaskDrafts):
                found = found.shortened(min(state.possible(found.tokens), self.block_size - 1))
                state.watch(planner, sequence, found)
            if best is None or planner.expected(sequence, found) > planner.expected(sequence, best):
                best = found
        return best or Draft()

    def _verify(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """How many drafts of each sequence pass [B], the token behind them [B], wanted log-probabilities [B, M + 1] by name."""
        states = [sequence.state for sequence in step.sequences]
        scores, drawn_from, wanted = self._scores(batch, step)
        counts = [len(state.draft.tokens) for state in states]
        most = max(counts)
        padded = [s.draft.tokens + [0] * (most - n) for s, n in zip(states, counts, strict=True)]
        drafts = to_device(padded, scores.device, torch.long).view(len(states), most)
        lengths = None if min(counts) == most else to_device(counts, scores.device)
        if batch.pipeline.do_sample:
            q = draft_distributions(states, drawn_from, drafts, scores.shape[-1])
            numbers = [state.uniforms.peek(n + 1).tolist() for state, n in zip(states, counts, strict=True)]
            uniform = torch.tensor(
                [u[:-1] + [0.0] * (most + 1 - len(u)) + u[-1:] for u in numbers], dtype=torch.float64
            )
            p = rectangle(scores.softmax(-1), counts)
            accepted, token = verify_sampled(p, drafts, lengths, q, to_device(uniform, scores.device))
            for state, n in zip(states, counts, strict=True):
                state.uniforms.advance(n + 1)
        else:
            accepted, token = verify_greedy(rectangle(likeliest(scores), counts), drafts, lengths)
        if not wanted:
            return accepted, token, {}
        followed = torch.cat([drafts, token[:, None]], dim=1)
        emitted = followed.where(torch.arange(most + 1, device=token.device) < accepted[:, None], token[:, None])
        return accepted, token, {n: of_tokens(rectangle(log_p, counts), emitted) for n, log_p in wanted.items()}

    def _scores(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Processed logits [N, V] of the rows that verify; those [M, V] that drafts were drawn from; log-probabilities [N, V].

        What drafts were drawn from matters where text is sampled. Only its hidden states were kept, so the head runs on
        both together. Log-probabilities, where wanted, are those of the rows that verify.
        """
        sequences, pipeline = step.sequences, batch.pipeline
        rows = [(sequence, j) for sequence in sequences for j in range(len(sequence.state.checked))]
        hidden = [step.hidden((i, sequence.state.checked) for i, sequence in enumerate(sequences))]
        hidden += [sequence.state.draft.hidden for sequence in sequences if sequence.state.draft.hidden is not None]
        raw = step.head(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        count = len(rows)
        wanted = {"logprobs": raw[:count].log_softmax(-1)} if batch.wants_logprobs else {}

        def left_of(row: int) -> tuple[int, list[int]]:
            sequence, j = rows[row]
            return sequence.left_of(sequence.state.draft.tokens[:j])

        if pipeline.needs_context:
            scores = pipeline.process_drafts(raw[:count], left_of, batch.stopping.eos_token_ids)
            drawn_from = pipeline.process(raw[count:])
        else:
            scores, drawn_from = pipeline.process(raw).tensor_split([count])
        if batch.wants_sampled_logprobs:
            wanted["sampled_logprobs"] = scores.log_softmax(-1)
        return scores, drawn_from if len(hidden) > 1 else None, wanted

    def _draft(self, batch: Batch, step: Step, accepted: Tensor, token: Tensor) -> Drawn:
        """What the look-ahead blocks of the ``accepted`` lengths [B] draft behind ``token`` [B], k - 1 tokens of each.

        A block's first mask stands where the token behind the accepted drafts went, so it drafts nothing. Where no block
        was provided for the length that came true, the result means nothing.
        """
        states, count = [sequence.state for sequence in step.sequences], self.block_size - 1
        most = max(len(state.checked) for state in states)
        width = step.hidden_states.shape[1]
        first = [
            [i * width + (state.blocks[a].start + 1 if a in state.blocks else 0) for a in range(most)]
            for i, state in enumerate(states)
        ]
        device = accepted.device
        rows = to_device(first, device).gather(1, accepted[:, None]) + torch.arange(count, device=device)
        hidden = step.hidden_states.flatten(0, 1).index_select(0, rows.flatten()).view(len(states), count, -1)
        uniform = None
        if batch.pipeline.do_sample:
            uniform = to_device(torch.stack([state.uniforms.peek(count) for state in states]), device)
        drafter = batch.state.drafter
        if drafter is None:
            return draw_independent(batch.pipeline, step.head, hidden, uniform)
        return drafter.draw(batch.pipeline, step.head, hidden, token, uniform)

    def _commit(
        self, batch: Batch, sequence: Sequence, accepted: int, token: int, logprobs: dict[str, list[float]]
    ) -> None:
        """Make the accepted drafts and the token behind them final, and learn from them."""
        draft = sequence.state.draft
        emitted = [*draft.tokens[:accepted], token]
        sequence.cached = len(sequence.tokens) + accepted
        batch.pipeline.commit(sequence.index, len(emitted))
        of_tokens = {name: values[: len(emitted)] for name, values in logprobs.items()}
        batch.commit(
            sequence,
            emitted,
            logprobs=of_tokens.get("logprobs"),
            sampled_logprobs=of_tokens.get("sampled_logprobs"),
        )
        sequence.cached = min(sequence.cached, len(sequence.tokens))
        if draft.tokens:
            if draft.source == MaskDrafts.name:  # what the text alone proposed is watched anyway
                batch.state.record(sequence, draft, accepted)
            sequence.acceptance_lengths.append(accepted)
