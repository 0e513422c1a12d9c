"""The sampler: from the logits of a step to emitted tokens and the next canvas, for all requests at once."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from serving.decisions import OpenBlocks, emitted_prefix, reveal, verify, without_prefix
from serving.layout import StepLayout, rectangle
from serving.uniforms import DRAW, TEST, uniforms


class BlockSampler:
    """Wraps vLLM's sampler, which processes logits (temperature, penalties, cuts) and knows the requests' parameters.

    state: the BlockModelState that made it.
    """

    def __init__(self, base: Any, state: Any):
        self.base = base
        self.state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __call__(self, logits: Tensor, input_batch: InputBatch, draft_logits: Tensor | None = None) -> SamplerOutput:
        layout = self.state.layout_of(input_batch)
        if layout is None:  # a dummy run that measures memory
            return self.base(logits, input_batch)
        step = _Step(self, layout, input_batch, logits)
        step.verify()
        step.reveal()
        return step.output()


class _Step:
    """One step. Shapes: R requests, L rows with logits, V vocabulary, W the most tokens that a request can emit."""

    def __init__(self, sampler: BlockSampler, layout: StepLayout, batch: InputBatch, logits: Tensor):
        self.base, self.state = sampler.base, sampler.state
        self.layout, self.batch, self.logits = layout, batch, logits
        self.device = logits.device
        self.slots = batch.idx_mapping_np
        self.temperature = self.base.sampling_states.temperature.np[self.slots]
        count, width = batch.num_reqs, self.state.settings.block_size
        self.emitted = torch.zeros(count, width, dtype=torch.int64, device=self.device)
        self.num_emitted = torch.zeros(count, dtype=torch.int32, device=self.device)
        self.num_computed = self._put(layout.pending).int()
        self.raw = logits.to(torch.float32, copy=True)
        self.raw[:, self.state.settings.mask_token_id] = -torch.inf
        self.processed = self._process()

    def verify(self) -> None:
        """Test drafts, choose the token behind those that pass, and draft anew."""
        layout = self.layout
        which = np.nonzero(layout.is_verified)[0]
        if not len(which):
            return
        lengths = layout.drafts[which]
        rows = self._put(rectangle(layout.logit_starts[which], lengths + 1))
        requests, slots, drafted = self._columns(which, self.slots[which], lengths)
        drafts = self.state.req_states.draft_tokens[slots, : int(lengths.max())]
        is_greedy, uniform = self._chance(which, self._positions(rows), TEST)
        if uniform is not None:  # the last number is for the token: every forward begins at another position
            draw = uniforms(self._seeds(which), self._positions(rows[:, :1]), DRAW)
            uniform = torch.cat([uniform[:, :-1], draw], dim=1)
        accepted, tokens = verify(self.processed, rows, drafts, drafted, is_greedy, uniform)
        self.emitted[requests, : tokens.shape[1]] = tokens
        self.num_emitted[requests] = (accepted + 1).int()
        self.num_computed[requests] += accepted.int()
        self._draft(which, slots, accepted == drafted)

    def reveal(self) -> None:
        """Decide masks of set blocks; emit what is finished of them."""
        layout, state = self.layout, self.state
        which = np.nonzero(layout.is_set_block)[0]
        if not len(which):
            return
        lengths = layout.masks[which]
        rows_np = rectangle(layout.logit_starts[which] + layout.logit_causal[which], lengths)
        anchored = layout.has_anchor[which]
        requests, slots, sizes = self._columns(which, self.slots[which], lengths)
        width = rows_np.shape[1]
        own = self._put(rows_np)
        masked = state.masked[slots, :width] & (torch.arange(width, device=self.device) < sizes[:, None])
        blocks = OpenBlocks(state.req_states.draft_tokens[slots, :width], masked, sizes)
        first, rows = None, own
        if anchored.any():
            first = torch.zeros_like(masked)
            first[:, 0] = masked[:, 0] & self._put(anchored)
            rows = own.clone()
            rows[:, 0] = torch.where(first[:, 0], self._put(layout.logit_starts[which]), own[:, 0])
        is_greedy, uniform = self._chance(which, self._positions(own), DRAW)
        blocks = reveal(
            blocks,
            self.raw,
            self.processed,
            rows,
            first,
            self._rules(which),
            self._scores_raw(which),
            is_greedy,
            uniform,
        )
        room = self._put(state.req_states.max_seq_len[self.slots[which]]) - state.req_states.total_len.gpu[slots]
        by_prefix = self._put(state.by_prefix[self.slots[which]])
        count = emitted_prefix(blocks, by_prefix, state.ends[slots], room)
        self.emitted[requests, :width] = blocks.tokens
        self.num_emitted[requests] = count.int()
        left = without_prefix(blocks, count, state.settings.mask_token_id)
        state.masked[slots, :width] = left.masked
        state.req_states.draft_tokens[slots, :width] = left.tokens

    def output(self) -> SamplerOutput:
        starts = self.batch.query_start_loc
        count = self.batch.num_reqs
        return SamplerOutput(
            sampled_token_ids=self.emitted,
            logprobs_tensors=self._logprobs(),
            num_nans=None,
            num_sampled=self.num_emitted,
            num_rejected=(starts[1 : count + 1] - starts[:count]).int() - self.num_computed,
        )

    def _draft(self, which: np.ndarray, slots: Tensor, all_accepted: Tensor) -> None:
        """The next canvas of verified requests: drafts and masks where all drafts were accepted, masks alone elsewhere."""
        counts = self.layout.logit_masks[which]
        mask_token, canvas = self.state.settings.mask_token_id, self.state.req_states.draft_tokens
        canvas[slots] = mask_token
        if not counts.any():
            return
        rows = self._put(rectangle(self.layout.logit_starts[which] + self.layout.logit_causal[which], counts))
        own = torch.arange(rows.shape[1], device=self.device) < self._put(counts)[:, None]
        drafts = self.processed.argmax(-1)[rows.clamp_max(len(self.processed) - 1)]
        canvas[slots, : rows.shape[1]] = torch.where(own & all_accepted[:, None], drafts, mask_token)

    def _process(self) -> Tensor:
        """Logits after penalties, temperature and cuts, float32 [L, V]; the same as ``raw`` where no request has any."""
        layout, batch = self.layout, self.batch
        if not len(layout.logit_rows):
            return self.raw
        slots, places = self._columns(self.slots[layout.logit_requests], layout.logit_places)
        tokens = batch.logits_indices
        # A causal row is asked for the next token, a mask row for its own.
        is_mask = layout.logit_rows >= (layout.token_starts + layout.causal)[layout.logit_requests]
        processed = self.base.apply_sampling_params(
            self.raw,
            slots,
            batch.idx_mapping,
            self.slots,
            batch.positions[tokens] - self._put(is_mask).long(),
            batch.input_ids[tokens],
            places.int(),
            batch.seq_lens_cpu_upper_bound.numpy(),
            skip_top_k_top_p=True,
        )
        top_k, top_p = self.base.sampling_states.get_top_k_top_p(slots, self.slots)
        if self.device.type == "cpu":  # vLLM's kernel for this is one that Triton's interpreter cannot run
            return apply_top_k_top_p_pytorch(processed, top_k, top_p, allow_cpu_sync=True)
        return apply_top_k_top_p(processed, top_k, top_p)

    def _chance(self, which: np.ndarray, positions: Tensor, purpose: int) -> tuple[Tensor | None, Tensor | None]:
        """Which requests are greedy, and numbers [B, ...] for the others; None and None if all are greedy."""
        greedy = self.temperature[which] == 0
        if greedy.all():
            return None, None
        return self._put(greedy), uniforms(self._seeds(which), positions, purpose)

    def _seeds(self, which: np.ndarray) -> Tensor:
        return self._put(self.base.sampling_states.seeds.np[self.slots[which]])[:, None]

    def _positions(self, rows: Tensor) -> Tensor:
        """Positions of rows of logits in their texts."""
        return self.batch.positions[self.batch.logits_indices[rows]]

    def _rules(self, which: np.ndarray) -> list[tuple[Any, Tensor]]:
        numbers = self.state.rule_of[self.slots[which]]
        return [(self.state.rules[number], self._put(numbers == number)) for number in np.unique(numbers)]

    def _scores_raw(self, which: np.ndarray) -> Tensor | None:
        """Whose rule looks at raw logits: those that ask for it, and greedy ones, as in sbd.SetBlockDecoder."""
        raw = self.state.scores_raw[self.slots[which]] & (self.temperature[which] != 0)
        return self._put(raw) if raw.any() else None

    def _logprobs(self) -> Any:
        """Log-probabilities of what was verified; set blocks have none."""
        layout, base = self.layout, self.base
        wanted = base.get_logprobs_dims(self.slots)
        counts = np.where(layout.is_verified, layout.drafts + 1, 0)
        if wanted is None or not counts.any():
            return None
        starts = layout.logit_starts - (counts.cumsum() - counts)
        rows = self._put(np.repeat(starts, counts) + np.arange(int(counts.sum())))
        requests = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(requests)) - np.repeat(counts.cumsum() - counts, counts)
        owners, offsets, slots = self._columns(requests, places, self.slots[requests])
        logits = self.processed if base.logprobs_mode in PROCESSED_LOGPROBS_MODES else self.logits
        return compute_topk_scores(
            logits[rows],
            wanted[0],
            self.emitted[owners, offsets],
            [0, *counts.cumsum().tolist()],
            logprob_token_ids_state=base.logprob_token_ids_state,
            expanded_idx_mapping=slots,
            max_per_req_token_ids=wanted[1],
            logits_mode=base.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    def _put(self, values: np.ndarray) -> Tensor:
        return async_tensor_h2d(np.ascontiguousarray(values), self.device)

    def _columns(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        """Several arrays of one length in one copy, int64."""
        return self._put(np.stack([array.astype(np.int64) for array in arrays])).unbind()
