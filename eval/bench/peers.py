"""Other programs that run the same weights, where they are installed: llama.cpp, by its Python binding."""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

PEERS = {"llama.cpp": "llama_cpp"}


def installed_peers() -> list[str]:
    """Names of the peers that can be measured here."""
    return [name for name, module in PEERS.items() if importlib.util.find_spec(module) is not None]


def peer_seconds(
    name: str, model: PreTrainedModel, context: int, new_tokens: int
) -> Callable[[], tuple[float, dict[str, Any]]]:
    """Seconds of one greedy text of ``name``, as a function; the weights of ``model`` are written as GGUF once.

    Raises ValueError for an architecture that cannot be written.
    """
    if name not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
    from llama_cpp import Llama

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.gguf"
    write_gguf(model, path)
    llama = Llama(
        str(path), n_ctx=context + new_tokens + 8, n_threads=torch.get_num_threads(), logits_all=False, verbose=False
    )
    ids = torch.randint(model.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()

    def run() -> tuple[float, dict[str, Any]]:
        assert folder  # lives as long as the weights are mapped
        llama.reset()
        started = time.perf_counter()
        llama.eval(ids)
        for _ in range(new_tokens - 1):
            llama.eval([llama.sample(temp=0.0)])
        llama.sample(temp=0.0)
        return time.perf_counter() - started, {}

    return run


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write a Llama of ``model``'s dtype as GGUF, its tokenizer a placeholder: ids go in and come out."""
    import gguf

    config: Any = model.config
    if config.model_type != "llama":
        raise ValueError(f"llama.cpp is measured on Llama shapes alone, got model_type={config.model_type!r}")
    writer = gguf.GGUFWriter(str(path), "llama")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>".encode() for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    is_bf16 = model.dtype == torch.bfloat16
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight",))
        if target is None or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns neighbours, transformers turns halves
            weight = weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        array = weight.float().numpy()
        if is_bf16 and weight.dim() > 1:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
