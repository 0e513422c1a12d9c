"""The selector's files: beside a model, an adapter, or alone; and what is said where it does not belong."""

import json

import pytest
import torch

from decoding.forward.adapter import GatedAdapter, gated_adapter
from decoding.forward.loading import load_model
from decoding.inputs.source import SELECTOR_FILE
from sbd import SetBlockObjective
from sbd.selector import NAME, WEIGHTS_FILE, attach_selector, draft_selector, load_selector
from tests.conftest import MASK


@pytest.fixture
def saved(fresh_model, tokenizer, tmp_path):
    """``saved(gated)``: folders of a base model and of an adapter or nothing on it, and the model with a random selector."""

    def save(gated: bool):
        base, folder = tmp_path / "base", tmp_path / "adapter"
        fresh_model("llama").save_pretrained(base)
        tokenizer.save_pretrained(base)
        model, _ = load_model(str(base))
        if gated:
            adapter = GatedAdapter(model, 2, 4)
            adapter.mask_token_id = MASK
            adapter.attach(model)
            adapter.save(model, folder, torch.float32)
            tokenizer.save_pretrained(folder)
        selector = attach_selector(model, 4)
        for weight in selector.parameters():
            weight.data = torch.randn_like(weight).bfloat16().float()  # as it is saved
        return folder if gated else base, model

    return save


def same_selector(one, other) -> bool:
    pairs = zip(draft_selector(one).parameters(), draft_selector(other).parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_it_is_loaded_from_beside_its_model_and_from_a_folder_of_its_own(saved, tokenizer, tmp_path, gated, alone):
    folder, model = saved(gated)
    own = tmp_path / "selector" if alone else folder
    own.mkdir(exist_ok=True)
    tokenizer.save_pretrained(own)
    draft_selector(model).save(model, own, str(folder) if alone else ".")
    loaded, _ = load_model(str(own), dtype=torch.float32)
    assert same_selector(loaded, model) and not any(w.requires_grad for w in draft_selector(loaded).parameters())
    assert (gated_adapter(loaded) is not None) == gated
    if alone:
        assert draft_selector(load_model(str(folder))[0]) is None


def test_save_pretrained_keeps_it(saved, tokenizer, tmp_path):
    _, model = saved(True)
    with pytest.warns(UserWarning, match="lies beside the model"):
        model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    assert same_selector(load_model(str(tmp_path / "copy"))[0], model)


def test_the_dtype_of_the_model_does_not_matter(saved):
    folder, model = saved(False)
    draft_selector(model).save(model, folder, ".")
    assert same_selector(load_model(str(folder), dtype=torch.bfloat16)[0].float(), model)


def test_one_of_another_vocabulary_or_another_model_is_refused(saved, fresh_model, tmp_path):
    folder, model = saved(False)
    draft_selector(model).save(model, tmp_path, str(folder))
    with pytest.raises(ValueError, match="was made for 97 tokens of width 64, and this model has 80 of width 64"):
        load_selector(fresh_model("llama", vocab_size=80), tmp_path)
    with pytest.raises(ValueError, match="was made for another model: the weights of the head differ"):
        load_selector(fresh_model("llama", seed=1), tmp_path)
    assert not hasattr(fresh_model("llama", seed=1), NAME)


def test_damaged_files_are_refused_in_one_sentence(saved, fresh_model, tmp_path):
    folder, model = saved(False)
    with pytest.raises(ValueError, match="holds no selector: draft_selector.json is missing"):
        load_selector(model, tmp_path)
    draft_selector(model).save(model, tmp_path, str(folder))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"short")
    with pytest.raises(ValueError, match="draft_selector.safetensors in .* cannot be read"):
        load_selector(fresh_model("llama"), tmp_path)
    settings = json.loads((tmp_path / SELECTOR_FILE).read_text())
    (tmp_path / SELECTOR_FILE).write_text(json.dumps(settings | {"rank": "4"}))
    with pytest.raises(ValueError, match="has no rank, or one that cannot be"):
        load_selector(fresh_model("llama"), tmp_path)


def test_one_that_is_loaded_later_takes_the_place_of_the_first(saved, fresh_model, tokenizer, tmp_path):
    """As where a model with a selector gets another, or an adapter that was trained with one."""
    folder, model = saved(False)
    draft_selector(model).save(model, folder, ".")
    with pytest.raises(ValueError, match="has a selector already"):
        attach_selector(model, 4)
    other = load_model(str(folder))[0]
    draft_selector(other).correction.weight.data += 1
    draft_selector(other).save(other, tmp_path, str(folder))
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float32)[0]
    assert same_selector(loaded, other.bfloat16().float()) and not same_selector(loaded, model)


def test_training_goes_on_from_the_one_that_a_model_has(saved):
    folder, model = saved(False)
    draft_selector(model).save(model, folder, ".")
    loaded, tokens = load_model(str(folder))
    assert not any(weight.requires_grad for weight in draft_selector(loaded).parameters())
    SetBlockObjective(selector=4).prepare(loaded, tokens)
    assert same_selector(loaded, model) and all(weight.requires_grad for weight in draft_selector(loaded).parameters())
    with pytest.raises(ValueError, match="selector must be 0 or 4, the rank of the one that the model has, got 8"):
        SetBlockObjective(selector=8).prepare(loaded, tokens)
