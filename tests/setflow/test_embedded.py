"""The embedded model: it loads, it is the default of every command, and it runs what its files promise."""

import json
import sys

import pytest
import torch

from decoding import decoder_from_spec, find_mask_token
from setflow import load_embedded, load_model, loading

pytestmark = pytest.mark.skipif(
    not (loading.EMBEDDED / "model.safetensors").is_file(),
    reason="setflow/embedded/model.safetensors is not there yet: make embedded",
)


def test_it_loads_in_float32_or_as_asked():
    model, tokenizer = load_embedded()
    assert model.dtype == torch.float32 and not model.training
    assert load_embedded(torch.bfloat16)[0].dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size
    assert find_mask_token(model) == tokenizer.mask_token_id


@pytest.mark.parametrize("name", [None, "embedded", "embedded-gated"])
def test_packaged_models_have_names(name):
    model, tokenizer = load_model(name)
    assert model.dtype == torch.float32 and len(tokenizer) == model.config.vocab_size
    assert hasattr(model, "gated_adapter") == (name == "embedded-gated")


def test_files_are_small_and_bfloat16():
    from safetensors import safe_open

    size = (loading.EMBEDDED / "model.safetensors").stat().st_size
    assert size < 20e6
    with safe_open(loading.EMBEDDED / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize(
    "spec", ["dfm:sampler=antigravity:Sampler", "antigravity:Decoder", "sbd:rule=antigravity:Rule"]
)
def test_a_model_names_no_code_to_import(spec):
    """A model's files must not make anything run; a user's own --decoder may."""
    model, _ = load_embedded()
    model.generation_config.decoder = spec
    with pytest.raises(ValueError, match="the model names code by its default decoder .* only with your consent"):
        loading.default_spec(model)
    assert "antigravity" not in sys.modules


def test_it_names_its_decoder_and_runs_it(setflow):
    model, _ = load_embedded()
    decoder_from_spec(model.generation_config.decoder)
    code, out, _ = setflow("generate", "478 + 395 = ?\n", "--json", "--compare", "--max-new-tokens", "80")
    report = json.loads(out)
    assert code == 0 and report["model"] == "embedded" and report["decoder"] == model.generation_config.decoder
    assert report["same_text"] or "lossless" not in report["decoder"]


def test_it_adds(setflow):
    _, out, _ = setflow("generate", "478 + 395 = ?\n", "--json", "--decoder", "ntp")
    assert json.loads(out)["text"].rstrip().endswith("478 + 395 = 873")


def test_without_the_files_the_message_is_clear(setflow, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    code, _, err = setflow("generate", "x")
    assert code == 2 and err == "error: this installation has no embedded model; name a model of your own\n"
