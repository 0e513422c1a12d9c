"""One door for models of every kind, and what is said about a name before anything is loaded."""

import json

import pytest
import torch

import decoding
from decoding.forward.adapter import GatedAdapter, gated_adapter
from decoding.forward.loading import EXTRAS, LOW_RANK_FILE, load_model
from decoding.inputs.source import check_source
from rpt import OFFSET_CODE_FILE, ResampleConfig, attach_offset_code, save_offset_code
from sbd.selector import attach_selector


@pytest.fixture
def saved(fresh_model, tokenizer, tmp_path):
    """``saved("stock" | "offset code" | "gated" | "gated on offset code")``: the folder of such a model, and the model."""

    def save(kind: str):
        base, folder = tmp_path / "base", tmp_path / "adapter"
        fresh_model("llama").save_pretrained(base)
        tokenizer.save_pretrained(base)
        model = decoding.forward.loading.load_weights(str(base))
        if "offset code" in kind:
            torch.nn.init.normal_(attach_offset_code(model, ResampleConfig()).table)
            save_offset_code(model, base)
        if "gated" not in kind:
            return base, model
        adapter = GatedAdapter(model, 2, 4)
        adapter.mask_token_id = model.generation_config.mask_token_id
        for term in adapter.terms.values():
            torch.nn.init.normal_(term.up)
        adapter.attach(model)
        adapter.save(model, folder, torch.float32)
        selector = attach_selector(model, 2).bfloat16()  # as it is saved
        selector.float().save(model, folder, ".")
        tokenizer.save_pretrained(folder)
        return folder, model

    return save


@pytest.mark.parametrize("kind", ["stock", "offset code", "gated", "gated on offset code"])
def test_every_kind_of_folder_is_loaded_with_all_that_belongs_to_it(saved, tokenizer, kind):
    folder, original = saved(kind)
    model, tokens = load_model(str(folder))
    assert tokens.get_vocab() == tokenizer.get_vocab() and not model.training
    assert (gated_adapter(model) is not None) == ("gated" in kind)
    assert hasattr(model, "offset_code") == ("offset code" in kind)
    expected = original.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_the_door_is_public():
    assert decoding.load_model is load_model and "load_model" in decoding.__all__


def test_the_files_of_extras_are_those_that_are_written(saved):
    folder, _ = saved("gated on offset code")
    for files, function in EXTRAS.items():
        places = (folder, folder.parent / "base")
        if files == (LOW_RANK_FILE,):
            continue  # peft's own, whose results finetune's tests load
        assert any(all((place / file).is_file() for file in files) for place in places), function
    assert (OFFSET_CODE_FILE,) in EXTRAS


def test_settings_reach_from_pretrained_and_a_tokenizer_may_lie_elsewhere(saved, tokenizer, tmp_path):
    folder, _ = saved("stock")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer.save_pretrained(tmp_path / "tokens")
    model, tokens = load_model(str(folder), tokenizer=str(tmp_path / "tokens"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and len(tokens) == len(tokenizer)


def test_an_adapter_that_does_not_fit_is_one_sentence(saved, fresh_model, tmp_path):
    folder, _ = saved("gated")
    fresh_model("llama", hidden_size=32).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="^model '.*adapter' cannot be loaded: the adapter in .* does not fit"):
        load_model(str(folder))
    file = folder / "gated_adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match="^model '.*adapter' cannot be loaded: .*gone"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-folder", "model 'no-such-folder' does not exist; give a folder with config.json, or a hub name"),
        ("./no/such", "does not exist"),
        ("~/no/such", "does not exist"),
        ("a/b/c", "does not exist"),
        ("here/model", "does not exist"),  # "here" is a folder, so this is no hub name
        ("made/model", "does not exist"),  # what this run makes itself
        ("empty", "has no config.json, so there is no model in it"),
        ("weights.safetensors", "is a file; give the folder that holds it"),
        ("", "does not exist"),
    ],
)
def test_names_that_cannot_be(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ValueError, match=message):
        check_source(source, made_in="made/out")


def test_names_that_can_be(saved):
    folder, _ = saved("gated")
    check_source(str(folder))
    check_source("owner/name")
