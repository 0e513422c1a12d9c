"""Models for the command line: the packaged ones, a folder, or a name on the hub; and the decoder that suits each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoding.inputs.source import check_source
from decoding.inputs.spec import DECODERS

if TYPE_CHECKING:  # a name can be checked without them
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_GATED = Path(__file__).parent / "embedded-gated"
SET_BLOCKS = "sbd:block_size=16,entropy_bound=0.1"


def find_source(name: str | None) -> str:
    """Where the model called ``name`` is: the folder of a packaged one, None being "embedded", or ``name`` itself.

    Raises ValueError if there can be no such model; nothing is loaded for that.
    """
    folder = {None: EMBEDDED, "embedded": EMBEDDED, "embedded-gated": EMBEDDED_GATED}.get(name)
    if folder is None:
        check_source(name)
        return name
    if not (folder / "model.safetensors").is_file():
        raise ValueError("this installation has no embedded model; name a model of your own")
    return str(folder)


def load_model(
    source: str | None = None, dtype: "torch.dtype | None" = None, **settings: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and the tokenizer called ``source``: a packaged one, a folder, or a name on the hub.

    Packaged are "embedded", which None stands for, and "embedded-gated": the embedded model as it was before set-block
    training, with a gated adapter. All else, and the settings, are as in :func:`decoding.load_model`.
    dtype: by default that of the files, for the packaged models float32. Raises ValueError if there is no such model.
    """
    found = find_source(source)

    from decoding import load_model

    if dtype is None:
        dtype = "auto" if found == source else "float32"
    return load_model(found, dtype=dtype, **settings)


def default_spec(model: "PreTrainedModel") -> str:
    """The decoder that the model names itself (``decoder`` of its generation config), else one that it can run.

    Raises ValueError if what it names would import code: that is for users to ask for, not for a model's files.
    """
    from decoding.forward.mask_token import has_mask_token

    if spec := getattr(model.generation_config, "decoder", None):
        name, _, settings = spec.partition(":")
        if name not in DECODERS or ":" in settings:
            raise ValueError(
                f"decoder {spec!r}, which the model names, must be one of {', '.join(DECODERS)} without any module:Class; "
                f"give it with --decoder if you trust the code that it names"
            )
        return spec
    return SET_BLOCKS if has_mask_token(model) else "ntp"
