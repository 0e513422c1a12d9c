"""The ways into a model: one argument of generate, install and uninstall, pipelines."""

import copy

import pytest
import torch
from transformers import pipeline

from decoding import NextTokenDecoder, install, uninstall
from sbd import SetBlockDecoder, TopK

SBD = SetBlockDecoder(block_size=4, rule=TopK(4))


def new_text(model, inputs, **arguments):
    return model.generate(**inputs, max_new_tokens=11, do_sample=False, **arguments)


def test_an_installed_decoder_serves_every_call_until_uninstall(fresh_model, prompts):
    model, inputs = fresh_model("llama"), prompts(6, 4)
    stock, ours = new_text(model, inputs), new_text(model, inputs, custom_generate=SBD)
    assert not torch.equal(stock, ours)
    install(model, SBD)
    assert torch.equal(new_text(model, inputs), ours)
    ids, mask = inputs.values()
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=11, do_sample=False), ours)
    uninstall(model)
    assert torch.equal(new_text(model, inputs), stock)
    uninstall(model)


def test_a_call_that_names_another_decoder_gets_that(fresh_model, prompts):
    model, inputs = fresh_model("llama"), prompts(6)
    stock, ours = new_text(model, inputs), new_text(model, inputs, custom_generate=SBD)
    install(model, SBD)
    assert torch.equal(new_text(model, inputs, custom_generate=NextTokenDecoder()), stock)
    assert torch.equal(new_text(model, inputs, custom_generate=None), stock)
    assert torch.equal(new_text(model, inputs), ours)


def test_installing_twice_leaves_nothing_behind(fresh_model, prompts, unchanged):
    model, inputs = fresh_model("llama"), prompts(6)
    stock = new_text(model, inputs)
    with unchanged(model):
        install(model, SBD)
        install(model, NextTokenDecoder())
        assert torch.equal(new_text(model, inputs), stock)
        uninstall(model)
    assert "generate" not in vars(model)


def test_installing_does_not_touch_other_models(fresh_model, prompts):
    model, other, inputs = fresh_model("llama"), fresh_model("llama"), prompts(6)
    stock = new_text(other, inputs)
    install(model, SBD)
    assert torch.equal(new_text(other, inputs), stock)


@pytest.mark.parametrize("value", [None, "sbd", SetBlockDecoder, lambda *args, **kwargs: None])
def test_only_decoders_can_be_installed(fresh_model, unchanged, value):
    model = fresh_model("llama")
    with unchanged(model), pytest.raises(ValueError, match="decoder must be a Decoder, got"):
        install(model, value)


def test_an_installed_decoder_refuses_what_it_cannot_honour(fresh_model, prompts):
    model = fresh_model("llama")
    install(model, SBD)
    with pytest.raises(ValueError, match="num_beams=3"):
        new_text(model, prompts(6), num_beams=3)


def test_a_model_with_an_installed_decoder_can_be_saved(fresh_model, prompts, tmp_path):
    model, inputs = fresh_model("llama"), prompts(6)
    install(model, SBD)
    ours = new_text(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.mask_token_id == 96
    assert torch.equal(new_text(loaded, inputs, custom_generate=SBD), ours)


def test_text_generation_pipeline_with_an_installed_decoder(fresh_model, tokenizer):
    model, prompt = fresh_model("llama"), "a b the end"
    generate = pipeline("text-generation", model=model, tokenizer=copy.deepcopy(tokenizer))
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    stock = generate(prompt, **settings)[0]["generated_text"]
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    direct = model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=SBD)[0, ids.shape[1] :]
    install(model, SBD)
    ours = generate(prompt, **settings)[0]["generated_text"]
    assert ours == tokenizer.decode(direct, skip_special_tokens=True) != stock
    batched = generate([prompt, "end"], batch_size=2, **settings)
    assert batched[0][0]["generated_text"] == ours
    stop = ours[4:6]
    stopped = generate(prompt, stop_strings=[stop], tokenizer=tokenizer, **settings)[0]["generated_text"]
    assert stopped.endswith(stop) and stopped == ours[: ours.index(stop) + 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (SetBlockDecoder, r"custom_generate must be a decoder such as SetBlockDecoder\(\), got the class"),
        (NextTokenDecoder, r"custom_generate must be a decoder such as NextTokenDecoder\(\), got the class"),
        ("sbd:block_size=4", r"write decoder_from_spec\('sbd:block_size=4'\)"),
        ("prompt-lookup", r"write decoder_from_spec\('prompt-lookup'\)"),
    ],
)
def test_what_is_no_decoder_yet_is_told_how_to_become_one(shared_model, prompts, given, message):
    with pytest.raises(ValueError, match=message):
        shared_model("llama").generate(**prompts(5), max_new_tokens=3, custom_generate=given)
