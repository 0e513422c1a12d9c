"""The gated adapter in the package: shipped beside its base model, loaded by name, the base model's text kept."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from decoding import NextTokenDecoder
from decoding.forward.adapter import GatedAdapter
from sbd import SelfSpeculativeDecoder
from setflow import embed, loading


@pytest.fixture
def shipped(tiny, tmp_path, monkeypatch):
    """A tiny base model and a random adapter, shipped as the real ones are."""
    for name in ("EMBEDDED", "EMBEDDED_GATED"):
        folder = tmp_path / ("embedded" if name == "EMBEDDED" else "embedded-gated")
        for module in (loading, embed):
            monkeypatch.setattr(module, name, folder)
    shutil.copytree(tiny, tmp_path / "embedded")
    shutil.copytree(tiny, tmp_path / "build" / "embedded-ntp")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "build" / "embedded-ntp")
    adapter = GatedAdapter(model, 2, 4)
    for term in adapter.terms.values():
        torch.nn.init.normal_(term.up)
    adapter.mask_token_id = AutoTokenizer.from_pretrained(tiny).mask_token_id
    model.generation_config.mask_token_id = adapter.mask_token_id
    model.generation_config.decoder = "sbd-lossless:block_size=4"
    with pytest.raises(ValueError, match="run the recipe embedded-gated first"):
        embed.ship_gated(tmp_path / "build")
    adapter.save(model, tmp_path / "build" / "embedded-gated")
    for name in ("README.md", "training.json"):
        (tmp_path / "build" / "embedded-gated" / name).write_text("{}")
    embed.ship_gated(tmp_path / "build")
    shutil.rmtree(tmp_path / "build")
    return tiny


def test_it_loads_by_name_and_says_what_its_base_says(shipped):
    model, tokenizer = loading.load_model("embedded-gated")
    assert loading.default_spec(model) == "sbd-lossless:block_size=4" and model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size and model.gated_adapter.rank == 2
    plain = AutoModelForCausalLM.from_pretrained(shipped)
    prompt, settings = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 12, "do_sample": False}
    text = plain.generate(prompt, **settings)
    for decoder in (None, NextTokenDecoder(), SelfSpeculativeDecoder(block_size=4)):
        assert torch.equal(model.generate(prompt, custom_generate=decoder, **settings), text)


def test_the_command_line_compares_it(shipped, setflow):
    code, out, err = setflow("generate", "1 + 1 = ?", "--model", "embedded-gated", "--max-new-tokens", "6", "--compare")
    assert code == 0 and "sbd-lossless:block_size=4" in err


def test_the_packaged_files_are_small():
    if not loading.EMBEDDED_GATED.is_dir():
        pytest.skip("setflow/embedded-gated is not there yet: setflow finetune embedded-gated")
    assert (loading.EMBEDDED_GATED / "gated_adapter.safetensors").stat().st_size <= 3e6
    folders = (loading.EMBEDDED, loading.EMBEDDED_GATED)
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) <= 20e6
