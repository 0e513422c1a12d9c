"""Models in one GGUF file, as llama.cpp has them, unpacked into stock models: ``load_model("FILE.gguf")``.

transformers reads the file (extra ``gguf``) and unpacks quantised weights. What comes of it is a plain model that can be
trained and saved, and runs as fast as any of its dtype: unlike in llama.cpp, the weights stay unpacked in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # "llama" holds Mistral's models as well
DIVISORS = "rope_freqs.weight"  # tensor of Llama 3.1 and later: what the frequency of each rotation is divided by
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
WHOLE = ("F32", "F64")  # types of tensors that lose digits in bfloat16


def gguf_config(path: str) -> PretrainedConfig:
    """The configuration in the file ``path``; raises ValueError for a model that is not decoded, or a damaged file."""
    with _read(path) as (folder, file, metadata, names):
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
        # transformers passes over both of these.
        if width := metadata.get(f"{metadata['general.architecture']}.attention.key_length"):
            config.head_dim = width
        if DIVISORS in names:
            (divisors,) = (tensor.data for tensor in _tensors(path) if tensor.name == DIVISORS)
            _scale_rotations(config, torch.tensor(divisors))
    vars(config).pop("quantization_config", None)
    return config


def gguf_tokenizer(path: str) -> Any:
    """The tokenizer in the file ``path``, with its chat template; raises ValueError as :func:`gguf_config`."""
    with _read(path) as (folder, file, *_):
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)


def gguf_model(path: str, dtype: Any = "auto", **settings: Any) -> PreTrainedModel:
    """The model in the file ``path``. dtype: "auto" is float32 if the file holds mostly that, else bfloat16.

    settings: as ``from_pretrained`` takes them. Raises ValueError as :func:`gguf_config`.
    """
    config = gguf_config(path)
    with _read(path) as (folder, file, *_):
        if dtype in ("auto", None):
            dtype = torch.float32 if _is_whole(path) else torch.bfloat16
        settings["quantization_config"] = GgufConfig(dequantize=True)
        unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, config=config, dtype=dtype, **settings)
    # That one counts as quantised, so it could be neither trained nor saved.
    del settings["quantization_config"]
    kind: Any = type(unpacked)
    model = kind.from_pretrained(None, config=config, state_dict=unpacked.state_dict(), dtype=dtype, **settings)
    model.generation_config = unpacked.generation_config
    model.config.name_or_path = model.name_or_path = path
    return model


@contextmanager
def _read(path: str) -> Iterator[tuple[str, str, dict[str, Any], tuple[str, ...]]]:
    """Inside, ``path`` is read: its folder, its name, what it says of the model, the names of its tensors."""
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        metadata, names = read_gguf_metadata(path)
    except Exception as error:  # of many kinds, by where the file ends
        raise ValueError(_damaged(error)) from error
    kind = metadata["general.architecture"]
    experts = " with experts" if metadata.get(f"{kind}.expert_count") else ""
    if experts or kind not in ARCHITECTURES:
        raise ValueError(
            f"its architecture is {kind!r}{experts}; of GGUF files only {', '.join(ARCHITECTURES)} are decoded"
        )
    try:
        yield str(Path(path).parent), Path(path).name, metadata, names
    except Exception as error:
        try:
            _tensors(path)
        except Exception as damage:
            raise ValueError(_damaged(damage)) from error
        raise


def _damaged(error: Exception) -> str:
    return f"the file is damaged, or was not downloaded to its end ({' '.join(str(error).split()) or type(error).__name__})"


def _tensors(path: str) -> list[Any]:
    from gguf import GGUFReader

    return GGUFReader(path).tensors


def _is_whole(path: str) -> bool:
    sizes = {True: 0, False: 0}
    for tensor in _tensors(path):
        sizes[tensor.tensor_type.name in WHOLE] += int(tensor.n_elements)
    return sizes[True] > sizes[False]


def _scale_rotations(config: PretrainedConfig, divisors: Tensor) -> None:
    """Name in ``config`` the scaling that ``divisors`` [head_dim / 2] come from; raises ValueError for one of another kind."""
    plain = config.rope_parameters
    steps = torch.arange(0, 2 * len(divisors), 2) / (2 * len(divisors))
    config.rope_parameters = {**plain, **LLAMA3, "factor": float(divisors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if not torch.allclose(plain["rope_theta"] ** -steps / scaled, divisors, rtol=1e-3):
        raise ValueError(f"its rotations are scaled ({DIVISORS}) in a way that is not known")
