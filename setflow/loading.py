"""Models for the command line: the embedded one, a folder, or a name on the hub; and the decoder that suits each."""

import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from decoding.forward.adapter import SETTINGS_FILE, base_of, holds_adapter, load_adapter
from decoding.forward.mask_token import has_mask_token
from rpt import OFFSET_CODE_FILE, load_offset_code

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_GATED = Path(__file__).parent / "embedded-gated"
MODEL_FILES = ("config.json", "adapter_config.json", SETTINGS_FILE)  # a model, or peft's or our adapter
SET_BLOCKS = "sbd:block_size=16,entropy_bound=0.1"


def load_model(source: str | None, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in folder ``source``, by that name on the hub, or embedded where ``source`` is None.

    A folder may hold an adapter, gated or peft's, that names its base model. "embedded-gated" is the embedded model as it
    was before set-block training, with a gated adapter.
    dtype: by default that of the files, for the embedded models float32. Raises ValueError if there is no such model.
    """
    packaged = {None: EMBEDDED, EMBEDDED_GATED.name: EMBEDDED_GATED}.get(source)
    if packaged is not None:
        if not (packaged / "model.safetensors").is_file():
            raise ValueError("this installation has no embedded model; name a model of your own")
        return _load(str(packaged), dtype or torch.float32)
    path = Path(source).expanduser()
    check_source(source)
    if path.is_dir() and not any((path / name).is_file() for name in MODEL_FILES):
        raise ValueError(f"model {source!r} is a folder without config.json, so there is no model in it")
    return _load(str(path) if path.is_dir() else source, dtype)


def check_source(source: str) -> None:
    """Raise ValueError for what can only be a mistyped path: asking the hub for it takes long without a network."""
    owner, _, name = source.partition("/")
    mistyped = not owner or not name or "/" in name or owner.startswith((".", "~")) or Path(owner).is_dir()
    if mistyped and not Path(source).expanduser().is_dir():
        raise ValueError(f"model {source!r} does not exist; give a folder with config.json, or a hub name OWNER/NAME")


def _load(name: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = base_of(name) if holds_adapter(name) else name
        model, info = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto", output_loading_info=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error
    # Weights that are not in the files are random, and nobody should miss that because the log is quiet.
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        warnings.warn(
            f"model {name!r}: {len(absent)} weights are not in its files and are random: {absent[0]}, ...", stacklevel=2
        )
    if (Path(name) / OFFSET_CODE_FILE).is_file():
        load_offset_code(model, name)
    if holds_adapter(name):
        load_adapter(model, name)
    return model.eval(), tokenizer


def default_spec(model: PreTrainedModel) -> str:
    """The decoder that the model names itself (``decoder`` of its generation config), else one that it can run."""
    if spec := getattr(model.generation_config, "decoder", None):
        return spec
    return SET_BLOCKS if has_mask_token(model) else "ntp"
