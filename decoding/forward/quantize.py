"""Weights of eight bits, by torchao: half the bytes of bf16, the same weights for every decoder."""

import logging

import torch
from transformers import PreTrainedModel

from decoding.inputs.checks import check_choice

KINDS = ("int8",)


def quantize(model: PreTrainedModel, kind: str) -> None:
    """Round the weights of all linear layers of ``model``, the head among them; activations stay as they are.

    kind: "int8", one scale for each output. Rows do not depend on each other, so decoders that verify are as exact as
    before, relative to the rounded model. Raises ValueError where torchao is missing or the model has adapters.
    """
    check_choice("quantize", kind, KINDS)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("quantize: the model has an adapter in its layers; merge it first")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells which of its GPU kernels it cannot load
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("quantize: needs torchao; install it by pip install 'setflow[quantize]'") from error
    trunk: torch.nn.Module = model.get_decoder()  # type: ignore[operator]
    quantize_(trunk, Int8WeightOnlyConfig())
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        quantize_(head, Int8WeightOnlyConfig())
