"""The mask token: where it comes from and what it starts as."""

import copy

import pytest
import torch

from decoding.forward.adapter import GatedAdapter
from decoding.training.new_mask_token import TOKEN, choose_mask_token, initialise_mask_token


@pytest.fixture
def bare(fresh_model, tokenizer):
    """``bare(vocab_size)``: a model and a tokenizer without any mask token."""

    def make(vocab_size: int = 97):
        model, plain = fresh_model("llama", vocab_size=vocab_size), copy.deepcopy(tokenizer)
        del model.generation_config.mask_token_id
        plain.mask_token = None
        return model.requires_grad_(True), plain

    return make


def test_what_is_wanted_or_known_comes_first(bare):
    model, tokenizer = bare()
    assert choose_mask_token(model, tokenizer, 0) == 0 == model.generation_config.mask_token_id
    assert choose_mask_token(model, tokenizer) == 0
    with pytest.raises(ValueError, match="from 0 to 96, got 97"):
        choose_mask_token(model, tokenizer, 97)


def test_an_unused_row_is_taken(bare):
    model, tokenizer = bare(128)
    assert choose_mask_token(model, tokenizer) == 97 == tokenizer.mask_token_id
    assert model.get_input_embeddings().num_embeddings == 128


def test_a_reserved_token_is_taken(bare):
    model, tokenizer = bare(99)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>", "<|reserved_special_token_0|>"]})
    assert choose_mask_token(model, tokenizer) == 98 and tokenizer.mask_token == "<|reserved_special_token_0|>"


def test_else_the_matrix_grows(bare):
    model, tokenizer = bare()
    assert choose_mask_token(model, tokenizer) == 97 and tokenizer.convert_ids_to_tokens(97) == TOKEN
    assert model.get_input_embeddings().num_embeddings == 128 == model.config.vocab_size


def test_a_gated_adapter_leaves_the_matrix_alone(bare):
    model, tokenizer = bare()
    before = model.get_input_embeddings().weight.clone()
    GatedAdapter(model, 2, 4).attach(model)
    mask_id = choose_mask_token(model, tokenizer)
    initialise_mask_token(model, mask_id)
    assert mask_id == tokenizer.pad_token_id == model.gated_adapter.mask_token_id
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert (model.gated_adapter.mask_embedding - before.mean(0)).abs().max() < before.std()


@pytest.mark.parametrize(
    ("special", "expected"),
    [({"unk_token": "!"}, "!"), ({}, "<pad>"), ({"pad_token": "<eos>", "unk_token": "<bos>"}, None)],
)
def test_a_frozen_matrix_is_left_alone_too(bare, special, expected):
    """As under LoRA, whose files do not hold it."""
    model, tokenizer = bare()
    model.requires_grad_(False)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    if expected is None:
        with pytest.raises(ValueError, match="mask_token_id: the tokenizer has no token to spare; set the objective's"):
            choose_mask_token(model, tokenizer)
        return
    with pytest.warns(UserWarning, match=f"no free row for a mask token, so '{expected}' is it"):
        mask_id = choose_mask_token(model, tokenizer)
    assert mask_id == tokenizer.convert_tokens_to_ids(expected) == model.generation_config.mask_token_id
    assert model.get_input_embeddings().num_embeddings == 97


def test_it_is_initialised_once(bare):
    model, _ = bare()
    before = model.get_input_embeddings().weight[96].clone()
    initialise_mask_token(model, 96)
    middle = model.get_input_embeddings().weight[96].clone()
    assert not torch.equal(before, middle)
    model.generation_config.trained_block_sizes = [2, 3]
    initialise_mask_token(model, 96)
    assert torch.equal(model.get_input_embeddings().weight[96], middle)
    assert middle.std() < 0.5 * model.get_input_embeddings().weight.std()


@pytest.mark.parametrize(("source", "kept"), [("mask", True), ("uniform", False)])
def test_a_flow_matching_model_keeps_the_mask_that_it_reads(bare, source, kept):
    """Also one of whole texts, which names no block sizes; one of uniform noise never read a mask."""
    model, _ = bare()
    before = model.get_input_embeddings().weight[96].clone()
    model.config.flow = {"source": source, "block_sizes": None}
    initialise_mask_token(model, 96, "random")
    assert torch.equal(model.get_input_embeddings().weight[96], before) is kept


def test_a_random_start_looks_like_any_other_row(bare):
    model, _ = bare()
    initialise_mask_token(model, 96, "random")
    table = model.get_input_embeddings().weight
    assert 0.5 < table[96].std() / table.std() < 1.5
