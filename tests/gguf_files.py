"""Tiny GGUF files, written from stock models as llama.cpp's converter does it; tests that need them skip without ``gguf``."""

import json

import pytest
import torch

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf: pip install 'setflow[gguf]'")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path, model, tokenizer=None, template: str | None = None, quantised: bool = False, **extra) -> str:
    """Write ``model`` and ``tokenizer``, a byte-level BPE, to ``path``; returns that as a text.

    quantised: matrices in blocks of 8 bits. extra: ``arch`` stands for the name of the architecture, ``divisors`` for what
    Llama 3.1 divides its frequencies by, ``experts`` for their number.
    """
    config = model.config
    arch = extra.get("arch", config.model_type)
    writer = gguf.GGUFWriter(str(path), arch)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if "experts" in extra:
        writer.add_expert_count(extra["experts"])
    _add_tokenizer(writer, config, tokenizer, template)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        if stem in OTHERS:
            written = f"{OTHERS[stem]}.{kind}"
        else:
            _, _, layer, part = stem.split(".", 3)
            written = f"blk.{layer}.{NAMES[part]}.{kind}"
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):  # llama.cpp rotates pairs of neighbours
            count = heads if stem.endswith("q_proj") else groups
            weight = weight.view(count, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        values = weight.float().numpy()
        if quantised and weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(written, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(written, values)
    if "divisors" in extra:
        writer.add_tensor("rope_freqs.weight", torch.as_tensor(extra["divisors"]).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add_tokenizer(writer, config, tokenizer, template: str | None) -> None:
    writer.add_tokenizer_model("gpt2")
    if tokenizer is None:
        tokens, special = [f"<{i}>" for i in range(config.vocab_size - 1)] + ["<3><4>"], {0, 1, 2}
        merges = ["<3> <4>"]
        ends = config.bos_token_id, config.eos_token_id
    else:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
        special, ends = set(tokenizer.all_special_ids), (tokenizer.bos_token_id, tokenizer.eos_token_id)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges(merges)
    for add, token in zip((writer.add_bos_token_id, writer.add_eos_token_id), ends, strict=True):
        if token is not None:
            add(token)
    if template is not None:
        writer.add_chat_template(template)
