"""setflow: Llama- and Qwen-type language models that decode several tokens per forward pass, from one set of weights.

The decoders live in the packages ``decoding``, ``sbd``, ``rpt`` and ``dfm``; this one holds the command line and a tiny
model, so that everything can be tried on a machine without any other model.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__version__ = "0.1.0"
__all__ = ["load_embedded"]


def load_embedded(dtype: "torch.dtype | None" = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The tiny model that comes with the package, and its tokenizer; it has learnt Python source and worked additions.

    dtype: arithmetic and weights, by default float32, which every CPU runs well; the files hold bfloat16.

        model, tokenizer = setflow.load_embedded()
        prompt = tokenizer("478 + 395 = ?\\n", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=80, custom_generate=decoder_from_spec("sbd:block_size=16"))
    """
    from setflow.loading import load_model  # torch and transformers take seconds to import

    return load_model(None, dtype)
