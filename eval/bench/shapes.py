"""Models of well-known shapes with random weights: as slow as the real ones, and made in a moment.

Their names are known before torch is imported.
"""

from typing import TYPE_CHECKING

from decoding.inputs.source import check_source, located

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# What each model's config.json says; "embedded" is the one in the box.
SHAPES = {
    "embedded": {
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
}


def check_shape(name: str) -> None:
    """Raise ValueError if ``name`` can be neither one of SHAPES nor a model."""
    if name not in SHAPES:
        check_source(name, named=f"shape {name!r} is none of {', '.join(SHAPES)}; as a model it")


def find_shape(name: str) -> "PretrainedConfig":
    """The configuration called ``name``: one of SHAPES, or that of a folder or of a model on the hub.

    Raises ValueError if there is none.
    """
    from transformers import AutoConfig

    from decoding.inputs.hub import hub_or_cache

    check_shape(name)
    if name in SHAPES:
        return AutoConfig.for_model(**SHAPES[name])
    try:
        with hub_or_cache(name):
            return AutoConfig.from_pretrained(located(name), trust_remote_code=False)
    except Exception as error:  # each kind of mistake has an error of its own there
        raise ValueError(f"shape {name!r} cannot be read: {' '.join(str(error).split())}") from error


def random_model(config: "PretrainedConfig", dtype: "torch.dtype", device: "torch.device") -> "PreTrainedModel":
    """A model of that shape, its weights drawn on ``device`` as for training; it never ends a text."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = None, 0
    return model.eval().requires_grad_(False)
