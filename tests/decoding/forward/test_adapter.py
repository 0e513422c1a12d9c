"""Row-gated LoRA: the base model stays as it is, bit for bit, and every decoder uses the adapter."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoding import NextTokenDecoder
from decoding.forward.adapter import (
    GatedAdapter,
    gated_adapter,
    load_adapter,
    remove_adapter,
)
from decoding.forward.gating import marked_block_rows
from decoding.forward.loading import load_weights
from decoding.inputs.source import ADAPTER_FILE
from decoding.training.packed import Packing
from sbd import SelfSpeculativeDecoder, SetBlockDecoder, SetBlockObjective
from tests.conftest import MASK

BATCH = {
    "input_ids": torch.randint(3, MASK, (2, 20), generator=torch.Generator().manual_seed(0)),
    "document_ids": torch.tensor([[0] * 13 + [1] * 7, [0] * 20]),
}


def adapted(model, seed: int = 0) -> GatedAdapter:
    """A random adapter on ``model``, strong enough to change every logit."""
    torch.manual_seed(seed)
    adapter = GatedAdapter(model, 4, 8)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    adapter.mask_token_id = MASK
    adapter.attach(model)
    return adapter


@pytest.fixture(params=["llama", "llama-tied", "qwen2", "qwen3", "mistral"])
def family(request):
    return request.param


def test_plain_forward_and_generate_are_untouched(fresh_model, unchanged, family, prompts):
    model = fresh_model(family)
    ids = torch.arange(3, 15)[None]
    before = model(input_ids=ids).logits
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    adapted(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), text)


def test_clean_rows_and_their_keys_are_bit_identical(fresh_model, family):
    """In the layout of training: same rows, adapter on and off."""
    from transformers import DynamicCache

    from decoding.forward.attention import run_trunk
    from decoding.training.blocks import BlockGrid, set_block_visibility

    model, tokens = fresh_model(family), BATCH["input_ids"]
    packing = Packing.from_document_ids(BATCH["document_ids"])
    blocks = BlockGrid.from_packing(packing, ~packing.is_padding, 4)
    rows = torch.cat([tokens, torch.full_like(tokens, MASK)], dim=1)
    is_block = (torch.arange(40) >= 20).expand_as(rows)

    def run():
        cache = DynamicCache()
        with marked_block_rows(is_block), torch.no_grad():
            hidden = run_trunk(
                model, rows, packing.position.repeat(1, 2), set_block_visibility(packing, [blocks]), 40, cache
            )
        return hidden, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]

    off = run()
    adapted(model)
    on = run()
    assert torch.equal(on[0][:, :20], off[0][:, :20]) and not torch.allclose(on[0][:, 20:], off[0][:, 20:])
    for after, before in zip(on[1] + on[2], off[1] + off[2], strict=True):
        assert torch.equal(after[:, :, :20], before[:, :, :20]) and not torch.equal(after[:, :, 20:], before[:, :, 20:])


def test_lossless_text_is_the_base_models(fresh_model, prompts):
    model, batch = fresh_model("llama"), prompts(7, 12)
    text = model.generate(**batch, max_new_tokens=12, do_sample=False)
    drafts = model.generate(**batch, max_new_tokens=12, do_sample=False, custom_generate=SetBlockDecoder(block_size=4))
    adapted(model)
    for decoder in (NextTokenDecoder(), SelfSpeculativeDecoder(block_size=4)):
        assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False, custom_generate=decoder), text)
    # The adapter does act: the lossy decoder says something else with it.
    other = model.generate(**batch, max_new_tokens=12, do_sample=False, custom_generate=SetBlockDecoder(block_size=4))
    assert not torch.equal(other, drafts)


def test_forwards_without_block_rows_do_not_meet_the_adapter(fresh_model, prompts):
    model, met = fresh_model("llama"), []
    for term in adapted(model).terms.values():
        term.register_forward_hook(lambda *_: met.append(1))
    for decoder, meets in ((NextTokenDecoder(), False), (SelfSpeculativeDecoder(block_size=4), True)):
        model.generate(**prompts(7, 12), max_new_tokens=4, do_sample=False, custom_generate=decoder)
        assert bool(met) == meets


def test_the_mask_embedding_is_the_adapters_on_block_rows_only(fresh_model):
    model = fresh_model("llama")
    adapter = adapted(model)
    tokens = torch.tensor([[5, MASK, MASK]])
    with marked_block_rows(torch.tensor([[False, False, True]])):
        embedded = model.get_input_embeddings()(tokens)[0]
    assert torch.equal(embedded[2], adapter.mask_embedding)
    assert torch.equal(embedded[1], model.get_input_embeddings().weight[MASK])


def gradients(model, objective) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    loss, metrics = objective(model, BATCH)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.gated_adapter.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach() * metrics["num_targets"], **{n: g * metrics["num_targets"] for n, g in found.items()}}


def test_frozen_clean_rows_change_neither_loss_nor_gradient(fresh_model, family):
    """Two forwards with the clean rows as constants = one forward with everything, for the masked part of the loss."""
    model = fresh_model(family, torch.float64)
    adapted(model).to(torch.float64)
    options = {"block_sizes": (4,), "distill": 0.5}
    two = gradients(model, SetBlockObjective(**options, gated=True))
    one = gradients(model, SetBlockObjective(**options, ntp_weight=0.0))
    assert two.keys() == one.keys() and len(two) == 2 + 2 * 7 * model.config.num_hidden_layers
    for name, value in two.items():  # the head's losses are float32 in any case
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for name, p in model.named_parameters() if "gated_adapter" not in name)


def test_saved_and_loaded_with_one_call(fresh_model, tmp_path, prompts):
    model, batch = fresh_model("llama"), prompts(9)
    adapter = adapted(model)
    model.generation_config.trained_block_sizes, model.generation_config.decoder = [4], "sbd:block_size=4"
    decoder = SetBlockDecoder(block_size=4)
    drafted = model.generate(**batch, max_new_tokens=12, do_sample=False, custom_generate=decoder)
    adapter.save(model, tmp_path, torch.float32)
    other = fresh_model("llama")
    plain = other.generate(**batch, max_new_tokens=12, do_sample=False)
    settings = other.generation_config.to_dict()
    load_adapter(other, tmp_path)
    assert torch.equal(other.generate(**batch, max_new_tokens=12, do_sample=False, custom_generate=decoder), drafted)
    assert other.generation_config.trained_block_sizes == [4]
    remove_adapter(other)
    assert gated_adapter(other) is None and not any(m._forward_hooks for m in other.modules())
    assert torch.equal(other.generate(**batch, max_new_tokens=12, do_sample=False), plain)
    assert {k: v for k, v in other.generation_config.to_dict().items() if v is not None} == {
        k: v for k, v in settings.items() if v is not None
    }


@pytest.mark.parametrize("place", ["apart", "together"])
def test_the_adapter_knows_its_base_model(fresh_model, tmp_path, prompts, place):
    """One call loads both, from two folders or from one that holds the base model's files too."""
    base = tmp_path / ("base" if place == "apart" else "adapter")
    fresh_model("llama").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted(model).save(model, tmp_path / "adapter", torch.float32)
    path = tmp_path / "adapter" / ADAPTER_FILE
    if place == "together":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model": "."}))
    loaded, batch = load_weights(str(tmp_path / "adapter")), prompts(9)
    settings = {"max_new_tokens": 12, "do_sample": False, "custom_generate": SetBlockDecoder(4, mask_token_id=MASK)}
    assert torch.equal(loaded.generate(**batch, **settings), model.generate(**batch, **settings))


def test_mistakes_are_named(fresh_model, tmp_path):
    model = fresh_model("llama")
    with pytest.raises(ValueError, match="no gated adapter"):
        remove_adapter(model)
    with pytest.raises(ValueError, match="gated_adapter.json is missing"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no linear layer.*nothing_proj"):
        GatedAdapter(model, 2, 4, ("nothing_proj",))
    adapted(model).save(model, tmp_path)
    with pytest.raises(ValueError, match="already"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(fresh_model("llama", hidden_size=32), tmp_path)


@pytest.fixture
def saved(fresh_model, tmp_path):
    """The folder of an adapter."""
    model = fresh_model("llama")
    adapted(model).save(model, tmp_path / "adapter", torch.float32)
    return tmp_path / "adapter"


def test_only_what_an_adapter_needs_is_taken_from_its_file_and_undone(fresh_model, saved, prompts):
    """A file may say more about generation than an adapter has to; the base model's text does not change."""
    path, batch = saved / ADAPTER_FILE, prompts(9)
    settings = json.loads(path.read_text())
    settings["generation"] |= {
        "repetition_penalty": 5.0,
        "suppress_tokens": [3, 4, 5],
        "eos_token_id": 7,
        "max_length": 3,
    }
    settings["generation"] |= {"decoder": "sbd-lossless", "trained_block_sizes": [4], "temperature": 9.0}
    path.write_text(json.dumps(settings))
    model = fresh_model("llama")
    before, text = model.generation_config.to_dict(), model.generate(**batch, max_new_tokens=12, do_sample=False)
    load_adapter(model, saved)
    changed = {
        name
        for name, value in model.generation_config.to_dict().items()
        if value != before.get(name) and name[0] != "_"
    }
    assert changed == {"decoder", "trained_block_sizes"}
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), text)
    remove_adapter(model)
    assert {k: v for k, v in model.generation_config.to_dict().items() if v is not None} == {
        k: v for k, v in before.items() if v is not None
    }
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False), text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank in gated_adapter.json must be a whole number of at least 1, got 0"),
        ({"rank": "4"}, "has no rank, or one that cannot be"),
        ({"rank": True}, "has no rank, or one that cannot be"),
        ({"rank": 3}, "does not fit this model"),
        ({"alpha": -1}, "alpha in gated_adapter.json must be"),
        ({"alpha": float("inf")}, "alpha in gated_adapter.json must be"),
        ({"alpha": None}, "has no alpha"),
        ({"targets": "q_proj"}, "has no targets"),
        ({"targets": [1]}, "targets in gated_adapter.json must be names of layers"),
        ({"targets": ["lm_heads"]}, "the model has no linear layer"),
        ({"base_model": 5}, "has no base_model"),
        ({"generation": []}, "has no generation"),
        ({"generation": {}}, "mask_token_id in gated_adapter.json must be a whole number from 0 to 96, got None"),
        ({"generation": {"mask_token_id": 97}}, "mask_token_id in gated_adapter.json must be .* got 97"),
        ({"generation": {"mask_token_id": "x"}}, "mask_token_id in gated_adapter.json must be .* got 'x'"),
        ([1, 2], "has no base_model"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\xff", "is not JSON"),
    ],
)
def test_a_damaged_file_of_settings_is_one_sentence(fresh_model, saved, change, message):
    path = saved / ADAPTER_FILE
    if isinstance(change, dict):
        change = json.dumps(json.loads(path.read_text()) | change)
    path.write_bytes(change.encode("latin-1") if isinstance(change, str) else json.dumps(change).encode())
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(fresh_model("llama"), saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "absent"])
def test_damaged_weights_are_one_sentence(fresh_model, saved, damage):
    path = saved / "gated_adapter.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    model = fresh_model("llama")
    with pytest.raises(ValueError, match="gated_adapter.safetensors in .* cannot be read"):
        load_adapter(model, saved)
    assert gated_adapter(model) is None and not any(module._forward_hooks for module in model.modules())
