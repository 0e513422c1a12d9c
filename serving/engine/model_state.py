"""What the worker keeps of each request between forwards, and the hooks through which vLLM's runner asks for it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from serving.engine.sampler import BlockSampler
from serving.engine.settings import settings_of
from serving.layout import SlotTable, StepLayout, VirtualRequests, plan_step, virtual_requests
from serving.options import DecoderOptions

ENDS = 8  # tokens that end a text and are looked for inside a block; vLLM looks for all of them behind it


class BlockModelState(DefaultModelState):
    """The state of requests that decode blocks.

    The tokens of a canvas are in the runner's ``req_states.draft_tokens``; ``masked`` [slots, block_size] says which of a
    set block are undecided. ``block_rows`` [tokens] bool marks the mask rows of the running forward, for gated adapters.
    """

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.settings = settings_of(vllm_config)
        slots, size = self.max_num_reqs, self.settings.block_size
        self.table = SlotTable.empty(slots)
        self.options: list[DecoderOptions] = [self.settings.default] * slots
        self.rules = list[Any]()
        self.rule_of = np.zeros(slots, dtype=np.int64)
        self.by_prefix = np.zeros(slots, dtype=bool)
        self.scores_raw = np.zeros(slots, dtype=bool)
        self.masked = torch.ones(slots, size, dtype=torch.bool, device=device)
        self.ends = torch.full((slots, ENDS), -1, dtype=torch.int64, device=device)
        self.block_rows: Tensor = getattr(model, "block_rows")  # noqa: B009  # the model's own buffer
        self.req_states: Any = None
        self._step: tuple[InputBatch, StepLayout] | None = None

    def get_supported_generation_tasks(self) -> tuple[Any, ...]:
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        self.req_states = sampler.req_states
        return BlockSampler(sampler, self), None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        options = self.settings.options(params.extra_args if params else None)
        self.options[req_index] = options
        self.table.is_lossless[req_index] = options.kind == "sbd-lossless"
        self.table.is_set_block[req_index] = options.kind == "sbd"
        self.table.is_anchored[req_index] = options.anchor
        self.table.block_size[req_index] = options.block_size
        self.by_prefix[req_index] = options.commit == "prefix"
        self.scores_raw[req_index] = options.entropy_from == "raw"
        if options.rule not in self.rules:
            self.rules.append(options.rule)
        self.rule_of[req_index] = self.rules.index(options.rule)
        self.masked[req_index] = True
        if self.req_states is not None:
            self.req_states.draft_tokens[req_index].fill_(self.settings.mask_token_id)
        ends = sorted(params.all_stop_token_ids)[:ENDS] if params else []
        if params and not params.ignore_eos and params.eos_token_id is not None:
            ends = [params.eos_token_id, *ends][:ENDS]
        self.ends[req_index] = async_tensor_h2d([*ends, *[-1] * (ENDS - len(ends))], self.device, torch.int64)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Tell the attention about virtual requests, and choose the rows that get logits."""
        if input_batch.num_draft_tokens_per_req is None:  # a dummy run, all of it text
            self._step = None
            return super().prepare_attn(
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                attn_groups,
                kv_cache_config,
                for_capture,
                ubatch_idx,
            )
        layout = self._plan(input_batch)
        virtual = virtual_requests(layout, input_batch.num_computed_tokens_np.astype(np.int64))
        self._step = (input_batch, layout)
        input_batch.logits_indices = async_tensor_h2d(layout.logit_rows, self.device, torch.int64)
        return self._attention(input_batch, virtual, block_tables, slot_mappings, attn_groups, kv_cache_config)

    def prepare_inputs(self, input_batch: InputBatch, req_states: Any) -> dict[str, Any]:
        """Write text that was emitted and has no keys and values yet, and mark the mask rows."""
        layout = self.layout_of(input_batch)
        self.block_rows.zero_()
        if layout is not None:
            decoding = ~input_batch.is_prefilling_np
            text = np.where(decoding, layout.pending, 0)
            rows = np.repeat(layout.token_starts - (text.cumsum() - text), text) + np.arange(int(text.sum()))
            slots = np.repeat(input_batch.idx_mapping_np, text)
            where = async_tensor_h2d(np.stack([rows, slots]), self.device, torch.int64)
            tokens = req_states.all_token_ids.gpu[where[1], input_batch.positions[where[0]]]
            input_batch.input_ids[where[0]] = tokens.to(input_batch.input_ids.dtype)
            starts = layout.token_starts + layout.causal
            masks = np.repeat(starts - (layout.masks.cumsum() - layout.masks), layout.masks)
            masks = async_tensor_h2d(masks + np.arange(len(masks)), self.device, torch.int64)
            self.block_rows.index_fill_(0, masks, True)
        return super().prepare_inputs(input_batch, req_states)

    def layout_of(self, input_batch: InputBatch) -> StepLayout | None:
        """The layout of ``input_batch``; None for one that is not real."""
        return self._step[1] if self._step is not None and self._step[0] is input_batch else None

    def _plan(self, input_batch: InputBatch) -> StepLayout:
        lengths = np.diff(input_batch.query_start_loc_np[: input_batch.num_reqs + 1]).astype(np.int64)
        done = input_batch.num_computed_prefill_tokens_np + lengths >= input_batch.prefill_len_np
        canvas = input_batch.num_draft_tokens_per_req.astype(np.int64)
        return plan_step(self.table, input_batch.idx_mapping_np, lengths, canvas, done | ~input_batch.is_prefilling_np)

    def _attention(
        self,
        batch: InputBatch,
        virtual: VirtualRequests,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
    ) -> dict[str, Any]:
        count = len(virtual.requests)
        starts = torch.from_numpy(virtual.query_starts.astype(np.int32))
        seq_lens = torch.from_numpy(virtual.seq_lens.astype(np.int32))
        columns = np.stack([virtual.requests, virtual.seq_lens, virtual.is_causal])
        requests, lens, causal = async_tensor_h2d(columns, self.device, torch.int64).unbind()
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=count,
            num_tokens=batch.num_tokens,
            query_start_loc_gpu=async_tensor_h2d(starts, self.device),
            query_start_loc_cpu=starts,
            max_query_len=int(virtual.query_lens.max()),
            seq_lens=lens.int(),
            max_seq_len=int(virtual.seq_lens.max()),
            block_tables=tuple(table[requests] for table in block_tables),
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=seq_lens,
            positions=batch.positions,
            is_prefilling=torch.from_numpy(batch.is_prefilling_np[virtual.requests]),
            causal=causal.int(),
        )
