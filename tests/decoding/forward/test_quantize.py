"""Weights of eight bits: the same text by every decoder, from the codes as they lie."""

import sys
from types import SimpleNamespace

import pytest
import torch

from decoding import Engine, NextTokenDecoder
from decoding.forward.quantize import quantize
from decoding.forward.static.linear import Int8Linear, Linear, is_int8
from decoding.forward.static.path import StaticPath
from sbd import SelfSpeculativeDecoder


class Int8Tensor(torch.Tensor):
    """A stand-in for torchao's weight: full weights that are whole multiples of a scale, and the codes."""

    @classmethod
    def rounded(cls, weight: torch.Tensor) -> "Int8Tensor":
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().to(torch.int8)
        made = (codes * scale).as_subclass(cls)
        made.qdata, made.scale, made.zero_point = codes, scale, torch.zeros_like(scale, dtype=torch.int8)
        made.block_size, made.act_quant_kwargs = [1, weight.shape[1]], None
        return made


@pytest.mark.parametrize("bias", [False, True])
def test_codes_compute_what_rounded_weights_do(bias):
    layers = [torch.nn.Linear(24, width, bias).requires_grad_(False) for width in (16, 8)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(Int8Tensor.rounded(layer.weight.data), requires_grad=False)
        vars(layer.weight).update(vars(Int8Tensor.rounded(layer.weight.data)))
    assert all(is_int8(layer.weight) for layer in layers)
    x, other = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    for name, arguments in (("__call__", ()), ("silu", ()), ("plus", (other,)), ("times", (other,))):
        found = getattr(Int8Linear(layers), name)(x, *arguments)
        torch.testing.assert_close(found, getattr(Linear(layers), name)(x, *arguments).as_subclass(torch.Tensor))


def test_other_weights_are_no_codes():
    weight = Int8Tensor.rounded(torch.randn(8, 24))
    assert is_int8(weight) and not is_int8(torch.randn(8, 24))
    weight.act_quant_kwargs = {}
    assert not is_int8(weight)
    weight.act_quant_kwargs, weight.zero_point = None, torch.ones(8, 1)
    assert not is_int8(weight)


def test_what_cannot_be_rounded_is_said(fresh_model, monkeypatch):
    with pytest.raises(ValueError, match="quantize must be one of 'int8', got 'int3'"):
        quantize(fresh_model("llama"), "int3")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="quantize: needs torchao"):
        quantize(fresh_model("llama"), "int8")
    with pytest.raises(ValueError, match="merge it first"):
        quantize(SimpleNamespace(_hf_peft_config_loaded=True), "int8")


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3"])
def test_every_decoder_writes_the_text_of_the_rounded_model(fresh_model, prompts, family):
    pytest.importorskip("torchao", reason="NOT TESTED: weights of eight bits, as torchao is not installed")
    model, arguments = fresh_model(family), prompts(9, 4) | {"max_new_tokens": 12, "do_sample": False}
    full = model(arguments["input_ids"]).logits
    quantize(model, "int8")
    stock = model.generate(**arguments)
    assert 0.01 < (model(arguments["input_ids"]).logits - full).abs().max() < 1
    for decoder in (NextTokenDecoder(), SelfSpeculativeDecoder(block_size=4)):
        for static in (True, False):
            engine = Engine(model, static=static)
            assert torch.equal(model.generate(**arguments, custom_generate=decoder, engine=engine), stock)
            assert engine.runs_static == static
    assert isinstance(StaticPath.of(model)._plain.layers[0].qkv, Int8Linear)
