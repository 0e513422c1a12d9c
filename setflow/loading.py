"""Models for the command line: the packaged ones, a folder, or a name on the hub; and the decoder that suits each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoding.inputs.source import check_source
from decoding.inputs.spec import names_code
from setflow.adapters import AUTO, add_adapter, check_adapter

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
    source: str | None = None, dtype: "torch.dtype | None" = None, adapter: str = AUTO, **settings: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and the tokenizer called ``source``: a packaged one, a folder, or a name on the hub.

    Packaged are "embedded", which None stands for, and "embedded-gated": the embedded model as it was before set-block
    training, with a gated adapter. All else, and the settings, are as in :func:`decoding.load_model`.
    dtype: by default that of the files, for the packaged models float32. adapter: a folder with a gated adapter, the name of
    one in the box, "none", or "auto": the one in the box that was made for these weights, if there is one; text stays the
    model's own. Raises ValueError if there is no such model or adapter, or if they do not fit.
    """
    check_adapter(adapter)
    found = find_source(source)

    from decoding import load_model

    if dtype is None:
        dtype = "auto" if found == source else "float32"
    model, tokenizer = load_model(found, dtype=dtype, **settings)
    add_adapter(model, adapter)
    return model, tokenizer


def default_spec(model: "PreTrainedModel", trusted: bool = False) -> str:
    """The decoder that the model names itself (``decoder`` of its generation config), else one that it can run.

    Raises ValueError if what the model's files name is no decoder, or one whose code is not ours and not ``trusted``.
    """
    from decoding.forward.mask_token import has_mask_token

    spec = getattr(model.generation_config, "decoder", None)
    if spec is None:
        return SET_BLOCKS if has_mask_token(model) else "ntp"
    if names_code(spec) and not trusted:
        raise ValueError(
            f"the model names code by its default decoder {spec!r}, which runs only with your consent: give --decoder, or say "
            f"--trust-remote-code"
        )
    return spec
