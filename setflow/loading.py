"""Models for the command line: the embedded one, a folder, or a name on the hub; and the decoder that suits each."""

import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from decoding import find_mask_token

EMBEDDED = Path(__file__).parent / "embedded"
SET_BLOCKS = "sbd:block_size=16,entropy_bound=0.1"


def load_model(source: str | None, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in folder ``source``, by that name on the hub, or embedded where ``source`` is None.

    dtype: by default that of the files, for the embedded model float32. Raises ValueError if there is no such model.
    """
    if source is None:
        if not (EMBEDDED / "model.safetensors").is_file():
            raise ValueError("this installation has no embedded model; name a model of your own")
        return _load(str(EMBEDDED), dtype or torch.float32)
    path = Path(source).expanduser()
    check_source(source)
    if path.is_dir() and not (path / "config.json").is_file():
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
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {error}") from error
    # Weights that are not in the files are random, and nobody should miss that because the log is quiet.
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        warnings.warn(
            f"model {name!r}: {len(absent)} weights are not in its files and are random: {absent[0]}, ...", stacklevel=2
        )
    return model.eval(), tokenizer


def default_spec(model: PreTrainedModel) -> str:
    """The decoder that the model names itself (``decoder`` of its generation config), else one that it can run."""
    if spec := getattr(model.generation_config, "decoder", None):
        return spec
    try:
        find_mask_token(model)
    except ValueError:
        return "ntp"
    return SET_BLOCKS
