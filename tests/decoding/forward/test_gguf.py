"""GGUF files become the stock models that they were written from; what cannot be decoded is said in one sentence."""

import importlib.util

import pytest
import torch

from decoding import load_model
from decoding.forward.loading import load_config, load_weights
from sbd import SelfSpeculativeDecoder
from tests.conftest import EOS
from tests.gguf_files import gguf, write_gguf


@pytest.fixture(params=["llama", "llama-tied", "qwen2", "qwen3"])
def written(request, fresh_model, tmp_path):
    """A model and the file that it was written to."""
    model = fresh_model(request.param, eos_token_id=EOS)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.normal_()
    return model, write_gguf(tmp_path / "model.gguf", model)


def test_a_file_holds_the_model_that_was_written(written):
    model, path = written
    loaded, _ = load_model(path)
    assert type(loaded) is type(model) and loaded.dtype == torch.float32 and not loaded.training
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    assert loaded.config.vocab_size == load_config(path).vocab_size == model.config.vocab_size
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_drafts_leave_its_text_as_it_is_and_it_can_be_saved(written, tmp_path, prompts):
    model, path = written
    loaded, _ = load_model(path)
    arguments = prompts(9, 5) | {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = loaded.generate(**arguments)
    decoder = SelfSpeculativeDecoder(draft="prompt_lookup")
    assert torch.equal(loaded.generate(**arguments, custom_generate=decoder), expected)
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_weights(str(tmp_path / "saved")).generate(**arguments), expected)


def test_quantised_weights_are_unpacked(fresh_model, tmp_path):
    model = fresh_model("llama")
    path = write_gguf(tmp_path / "model.gguf", model, quantised=True)
    assert load_weights(path).dtype == torch.bfloat16, "a dtype that is enough for 8 bits"
    loaded = load_weights(path, dtype=torch.float32)
    (block,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    expected = torch.tensor(gguf.dequantize(block.data, block.tensor_type))
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, expected)
    assert not torch.equal(expected, model.model.layers[1].mlp.up_proj.weight)


def test_scaled_rotations_of_llama_3_are_known(fresh_model, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    model = fresh_model("llama", rope_parameters=rope)
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    divisors = plain / model.model.rotary_emb.inv_freq
    assert divisors.max() == 8 and divisors[0] == 1 and 1.1 < divisors[4] < 7.9
    path = write_gguf(tmp_path / "model.gguf", model, divisors=divisors)
    loaded = load_weights(path)
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    path = write_gguf(tmp_path / "other.gguf", model, divisors=divisors + torch.arange(8))
    with pytest.raises(ValueError, match="cannot be loaded: its rotations are scaled"):
        load_weights(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"arch": "gemma"}, "its architecture is 'gemma'; of GGUF"),
        ({"experts": 8}, "its architecture is 'llama' with experts"),
    ],
)
def test_other_architectures_are_refused(fresh_model, tmp_path, extra, message):
    path = write_gguf(tmp_path / "model.gguf", fresh_model("llama"), **extra)
    with pytest.raises(ValueError, match=f"model .*model.gguf' cannot be loaded: {message}") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.00005, 0.005, 0.3, 0.9999])
def test_a_download_that_broke_off_is_said(fresh_model, tmp_path, share):
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, fresh_model("llama"))
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(share * len(content))])
    for load in (load_model, load_config):
        with pytest.raises(ValueError, match="the file is damaged, or was not downloaded to its end"):
            load(str(cut))


def test_what_is_missing_is_named(fresh_model, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", fresh_model("llama"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(ValueError, match=r"needs gguf to be read: pip install 'setflow\[gguf\]'"):
        load_model(path)
    with pytest.raises(ValueError, match="is a file; give the folder that holds it"):
        load_model(__file__)
