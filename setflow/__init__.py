"""setflow: Llama- and Qwen-type language models that decode several tokens per forward pass, from one set of weights.

The decoders live in the packages ``decoding``, ``sbd``, ``rpt``, ``dfm`` and ``steering``, and have their names here, too;
this one holds the command line and a tiny model, so that everything can be tried on a machine without any other model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from setflow.shadows import check_shadows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from decoding import NextTokenDecoder, decoder_from_spec, install, uninstall
    from dfm import FlowDecoder
    from rpt import ResampleDecoder
    from sbd import SelfSpeculativeDecoder, SetBlockDecoder
    from setflow.loading import load_model
    from steering import SteeredDecoder

__version__ = "0.1.0"
__all__ = [
    "FlowDecoder",
    "NextTokenDecoder",
    "ResampleDecoder",
    "SelfSpeculativeDecoder",
    "SetBlockDecoder",
    "SteeredDecoder",
    "decoder_from_spec",
    "install",
    "load_embedded",
    "load_model",
    "uninstall",
]
# Where a name comes from; imported with it, because torch and transformers take seconds.
_HOMES = {
    "FlowDecoder": "dfm",
    "NextTokenDecoder": "decoding",
    "ResampleDecoder": "rpt",
    "SelfSpeculativeDecoder": "sbd",
    "SetBlockDecoder": "sbd",
    "SteeredDecoder": "steering",
    "decoder_from_spec": "decoding",
    "install": "decoding",
    "load_model": "setflow.loading",
    "uninstall": "decoding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_shadows()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_embedded(dtype: "torch.dtype | None" = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The tiny model that comes with the package, and its tokenizer; it has learnt Python source and worked additions.

    dtype: arithmetic and weights, by default float32, which every CPU runs well; the files hold bfloat16.

        model, tokenizer = setflow.load_embedded()
        prompt = tokenizer("478 + 395 = ?\\n", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=80, custom_generate=decoder_from_spec("sbd:block_size=16"))
    """
    check_shadows()
    from setflow.loading import load_model

    return load_model("embedded", dtype)
