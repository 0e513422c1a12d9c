"""Models that accelerate prepared for mixed precision are decoded under its autocast, as ``generate`` runs them."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from decoding import Engine, NextTokenDecoder
from decoding.forward.model import is_tested
from decoding.forward.rows import RowList
from sbd import SelfSpeculativeDecoder
from tests.conftest import MASK


@pytest.fixture
def accelerate():
    """``accelerate(precision, model)``: the model as an Accelerator of its own prepares it."""

    def prepare(precision, model):
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(mixed_precision=precision, cpu=True).prepare_model(model, evaluation_mode=True)

    yield prepare
    AcceleratorState._reset_state(reset_partial_state=True)


def causal_logits(engine, ids):
    rows = RowList()
    rows.add_causal(ids[0].tolist(), 0)
    step = engine.step([rows], engine.new_cache(1))
    return engine.head(step.hidden_states[0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_the_autocast(fresh_model, prompts, accelerate, family):
    model, ids = fresh_model(family), prompts(12)["input_ids"]
    with torch.no_grad():
        exact = model(ids).logits[0]
    model = accelerate("bf16", model)
    assert is_tested(model)
    with torch.no_grad():
        stock = model(ids).logits[0]
    found = causal_logits(Engine(model), ids)
    rounding = (stock - exact).abs().max()
    assert found.dtype == torch.float32 and rounding > 1e-3
    # The same operations on the same shapes but for the masks of attention, so far nearer than bf16 is to float32.
    assert (found - stock).abs().max() < rounding / 2


@pytest.mark.parametrize(
    "decoder",
    [NextTokenDecoder(), SelfSpeculativeDecoder(block_size=4), SelfSpeculativeDecoder(draft="prompt_lookup")],
    ids=["ntp", "lossless", "lookup"],
)
def test_every_forward_runs_under_the_autocast(fresh_model, prompts, accelerate, decoder):
    model = accelerate("bf16", fresh_model("llama"))
    seen = []
    for module in (model.model, model.lm_head):
        module.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [MASK]}
    model.generate(**prompts(7, 4), custom_generate=decoder, **settings)
    assert seen and all(seen)
    assert not torch.is_autocast_enabled("cpu")  # and none is left behind


def test_an_unwrapped_model_is_exact_again(fresh_model, prompts, accelerate):
    model, inputs = fresh_model("llama"), prompts(7, 4)
    settings = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [MASK]}
    stock = model.generate(**inputs, **settings)
    accelerate("bf16", model)
    model.forward = vars(model).pop("_original_forward")  # as Accelerator.unwrap_model does
    assert torch.equal(model.generate(**inputs, custom_generate=NextTokenDecoder(), **settings), stock)


def test_a_forward_that_was_replaced_by_others_is_tried_out(fresh_model):
    model = fresh_model("llama")
    model.forward = model.forward
    assert not is_tested(model)
