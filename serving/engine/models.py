"""vLLM's own models with a state that decodes blocks, and with a gated adapter where the model has one.

Their forward passes are untouched: what differs are the hooks that vLLM looks for on a model's class.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from serving.engine.adapter import attach_adapter, is_of_adapter
from serving.engine.settings import Settings, settings_of


class _DecodesBlocks:
    """Stands before a model of vLLM's. ``block_rows`` [tokens] bool: which rows of the running forward are masks."""

    setflow: Settings
    block_rows: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        self.setflow = settings_of(vllm_config)
        rows = torch.zeros(vllm_config.scheduler_config.max_num_batched_tokens, dtype=torch.bool)
        self.register_buffer("block_rows", rows, persistent=False)  # type: ignore[attr-defined]

    @staticmethod
    def get_model_state_cls() -> type:
        from serving.engine.model_state import BlockModelState

        return BlockModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """An adapter's file may lie beside the model's, and vLLM reads all that lies there."""
        loaded = super().load_weights(pair for pair in weights if not is_of_adapter(pair[0]))  # type: ignore[misc]
        if self.setflow.adapter is not None:
            attach_adapter(self, self.setflow.adapter, self.setflow.mask_token_id, self.block_rows)
        return loaded


class SetflowLlamaForCausalLM(_DecodesBlocks, LlamaForCausalLM):
    pass


class SetflowMistralForCausalLM(_DecodesBlocks, MistralForCausalLM):
    pass


class SetflowQwen2ForCausalLM(_DecodesBlocks, Qwen2ForCausalLM):
    pass


class SetflowQwen3ForCausalLM(_DecodesBlocks, Qwen3ForCausalLM):
    pass
