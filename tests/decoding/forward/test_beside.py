"""``save_pretrained`` of a model with something on it: saved whole, and said; copies and pickles are models of their own."""

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoding import load_model, remove_adapter
from decoding.forward.adapter import GatedAdapter, gated_adapter, load_adapter
from rpt import ResampleConfig, ResampleDecoder, attach_offset_code
from sbd import SelfSpeculativeDecoder, SetBlockDecoder
from tests.conftest import MASK

KINDS = ["gated", "offset code", "both"]


@pytest.fixture
def made(fresh_model, tmp_path):
    """``made(kind)``: a model with an adapter that was loaded, an offset code or both."""

    def make(kind: str, family: str = "llama"):
        torch.manual_seed(0)
        model = fresh_model(family)
        if kind != "gated":
            torch.nn.init.normal_(attach_offset_code(model, ResampleConfig()).requires_grad_(False).table, std=0.1)
        if kind != "offset code":
            adapter = GatedAdapter(model, 2, 4)
            adapter.mask_token_id = MASK
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            trained = copy.copy(model.generation_config)
            model.generation_config.trained_block_sizes, model.generation_config.decoder = [4], "sbd-lossless"
            adapter.save(model, tmp_path / "adapter", torch.float32)
            model.generation_config = trained
            load_adapter(model, tmp_path / "adapter")
        return model

    return make


def texts(model, kind: str) -> list[list[int]]:
    """What decoders make of it that use what is on the model."""
    decoders = [] if kind == "offset code" else [SetBlockDecoder(4, mask_token_id=MASK), SelfSpeculativeDecoder(4)]
    decoders += [] if kind == "gated" else [ResampleDecoder(iterations=1)]
    settings = {"max_new_tokens": 12, "do_sample": False}
    return [model.generate(torch.tensor([[5, 6, 7]]), custom_generate=d, **settings)[0].tolist() for d in decoders]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_model_is_saved_with_what_is_on_it(made, tokenizer, tmp_path, kind, family):
    model = made(kind, family)
    with pytest.warns(UserWarning, match="decoding.load_model opens all of it, from_pretrained the model alone"):
        model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")  # nothing in it names a place
    loaded, _ = load_model(str(tmp_path / "moved"))
    assert texts(loaded, kind) == texts(model, kind)
    weights, again = model.state_dict(), loaded.state_dict()
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    if kind != "offset code":
        assert loaded.generation_config.decoder == "sbd-lossless"
        assert loaded.generation_config.trained_block_sizes == [4]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_loads_the_model_alone(made, tmp_path, kind):
    model = made(kind)
    with pytest.warns(UserWarning):
        model.save_pretrained(tmp_path / "saved")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert getattr(plain.generation_config, "decoder", None) is None  # it would name what the adapter has learned
    assert getattr(plain.generation_config, "trained_block_sizes", None) is None
    if kind != "gated":
        with pytest.raises(ValueError, match="no offset code: load it with decoding.load_model"):
            texts(plain, "offset code")
    if kind != "offset code":
        plain.generation_config.mask_token_id = None  # as in most models; those of these tests have one
        with pytest.raises(ValueError, match="beside this model lies a gated adapter .* decoding.load_model"):
            plain.generate(torch.tensor([[5, 6]]), max_new_tokens=4, custom_generate=SelfSpeculativeDecoder(4))


def test_saving_leaves_the_model_as_it_is(made, tmp_path):
    model = made("gated")
    before, settings = texts(model, "gated"), model.generation_config.to_dict()
    with pytest.warns(UserWarning):
        model.save_pretrained(tmp_path / "saved")
    assert texts(model, "gated") == before and model.generation_config.to_dict() == settings


def test_a_state_that_is_given_is_saved_as_it_is_and_stock_models_as_ever(made, fresh_model, tmp_path, recwarn):
    model = made("both")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    fresh_model("llama").save_pretrained(tmp_path / "stock")
    for name in ("given", "stock"):
        assert not [file for file in (tmp_path / name).iterdir() if "adapter" in file.name or "offset" in file.name]
    assert not [warning for warning in recwarn if "from_pretrained" in str(warning.message)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copy_is_a_model_of_its_own(made, kind, way):
    model = made(kind)
    before = texts(model, kind)
    if way == "copied":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert texts(twin, kind) == before
    for name, module in twin.named_children():
        if name in ("gated_adapter", "offset_code"):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=3.0)
    assert texts(model, kind) == before and texts(twin, kind) != before
    if kind == "gated":
        remove_adapter(twin)
        assert gated_adapter(model) is not None and texts(model, kind) == before
