"""The config hook: what vLLM must be told about a model that decodes blocks, taken from the model's own files.

A model takes part if its generation config or gated adapter names a decoder of ours, or if ``--additional-config
'{"setflow": {"decoder": SPEC}}'`` does, which is what ``setflow serve --decoder`` says. Any other model is vLLM's alone.
"""

from pathlib import Path
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from decoding.forward.adapter import read_settings
from decoding.inputs.checks import check_count
from decoding.inputs.source import ADAPTER_FILE
from serving.engine.settings import KEY, Settings
from serving.engine.validation import name_of_check
from serving.options import LARGEST_BLOCK, options_from_spec, request_spec, served_spec

logger = init_logger("vllm.setflow")
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
WISHES = ("decoder", "block_size_limit", "adapter")
NO_DECODER = "none"  # vLLM's own decoding, whatever the model names


def install_hooks() -> None:
    """Let vLLM ask :func:`prepare` about each model of our families, after its own hook if it has one. May be called again."""
    for architecture in FAMILIES:
        known = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not issubclass(known, _Hook):
            MODELS_CONFIG_MAP[architecture] = type(f"Setflow{architecture}Config", (_Hook, known), {})


class _Hook(VerifyAndUpdateConfig):
    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        super().verify_and_update_config(vllm_config)
        prepare(vllm_config)


def prepare(vllm_config: Any) -> None:
    """Make ``vllm_config`` one that decodes blocks, if its model does. Raises ValueError for what does not go with that."""
    wishes = dict(vllm_config.additional_config.get(KEY, {}))
    for key in wishes:
        if key not in WISHES:
            raise ValueError(f"additional-config: {KEY} takes {', '.join(WISHES)}, got {key!r}")
    settings = _settings(vllm_config.model_config, wishes)
    if settings is None:
        return
    _check(vllm_config)
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    (architecture,) = model.hf_config.architectures
    model.hf_config.architectures = [f"Setflow{architecture}"]
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settings.to_dict()}
    vllm_config.diffusion_config = DiffusionConfig(canvas_length=settings.canvas_length)
    scheduler.scheduler_cls = "serving.engine.scheduler.BlockScheduler"
    scheduler.async_scheduling = False
    model.logits_processors = [*(model.logits_processors or ()), name_of_check(settings)]
    if current_platform.is_cuda():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        # Each request says by itself whether it is causal, and how many there are changes from step to step.
        if vllm_config.attention_config.backend is None:
            vllm_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    needed = scheduler.max_num_seqs * 2 * settings.block_size
    if needed > scheduler.max_num_batched_tokens:
        logger.warning(
            "max_num_batched_tokens=%d has no room for the blocks of max_num_seqs=%d requests at once, which take up to %d: "
            "some will wait",
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            needed,
        )
    logger.info("decoding with %s, blocks of up to %d tokens", settings.decoder, settings.block_size)


def _settings(model: Any, wishes: dict[str, Any]) -> Settings | None:
    """What the model's files and ``wishes`` add up to; None for a model that names no decoder."""
    generation = model.try_get_generation_config()
    adapter = wishes.get("adapter")
    if adapter is None and (Path(model.model) / ADAPTER_FILE).is_file():
        adapter = model.model
    own = dict(generation)
    if adapter is not None:
        own |= {key: value for key, value in read_settings(adapter)["generation"].items() if value is not None}
    named, wished = own.get("decoder"), wishes.get("decoder")
    is_ours = str(named).partition(":")[0] in ("sbd", "sbd-lossless")
    if wished == NO_DECODER or (wished is None and not is_ours):
        return None
    default = served_spec(str(named)) if is_ours else "ntp"
    decoder = default if wished is None else request_spec(default, {"decoder": wished})
    if wished is None and decoder != named:
        logger.info("the model names decoder %s, of which a server has %s", named, decoder)
    options = options_from_spec(decoder)
    mask_token_id = own.get("mask_token_id", getattr(model.hf_config, "mask_token_id", None))
    if mask_token_id is None:
        raise ValueError(
            f"mask_token_id: the files of {model.model!r} name no mask token, which decoder {decoder} needs; fine-tune it with "
            f"the set-block objective, or serve it with --decoder none"
        )
    check_count("mask_token_id", mask_token_id, 0, model.get_vocab_size() - 1)
    trained = max(own.get("trained_block_sizes") or [options.block_size])
    largest = wishes.get("block_size_limit", max(options.block_size, min(trained, LARGEST_BLOCK)))
    check_count("block_size_limit", largest, options.block_size, LARGEST_BLOCK)
    return Settings(decoder, largest, mask_token_id, adapter)


def _check(vllm_config: Any) -> None:
    """Raise ValueError for settings of vLLM under which blocks would be decoded wrongly, or not at all."""
    model, scheduler, parallel = vllm_config.model_config, vllm_config.scheduler_config, vllm_config.parallel_config
    refused = {
        "speculative-config": vllm_config.speculative_config is not None,
        "async-scheduling": scheduler.async_scheduling is True,
        "lora": vllm_config.lora_config is not None,
        "enable-prompt-embeds": model.enable_prompt_embeds,
        "enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "long-prefill-token-threshold": scheduler.long_prefill_token_threshold > 0,
        "scheduler-cls": scheduler.scheduler_cls is not None,
        "a model with sliding windows": model.get_sliding_window() is not None,
    }
    for name, is_set in refused.items():
        if is_set:
            raise ValueError(f"{name} does not go with block decoding; leave it out, or serve with --decoder none")
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "block decoding needs vLLM's Model Runner V2, which this process cannot use; start it with `setflow serve` or "
            "serving.load, which prepare that, or set VLLM_USE_V2_MODEL_RUNNER=1"
        )
