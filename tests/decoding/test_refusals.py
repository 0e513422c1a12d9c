"""What cannot be honoured is refused by name, before the model is run, and leaves the model as it was."""

import warnings

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import logits_process as processors

from decoding import Engine, NextTokenDecoder, SlotCache
from sbd import SetBlockDecoder

NTP, SBD = NextTokenDecoder(), SetBlockDecoder(block_size=4)
DECODERS = pytest.mark.parametrize("decoder", [NTP, SBD], ids=["ntp", "sbd"])


@pytest.fixture
def assert_refused(monkeypatch, unchanged):
    """``assert_refused(model, message, **arguments)``: generate raises ValueError, runs no forward, changes nothing."""

    def check(model, message: str, **arguments):
        forwards = []
        with unchanged(model):
            with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
                patch.setattr(Engine, "forward", lambda *_: forwards.append(1) or pytest.fail("the model was run"))
                model.generate(**arguments)
        assert not forwards

    return check


REQUESTS = {
    "num_beams": ({"num_beams": 2}, "num_beams=2"),
    "output_scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
    "output_logits": ({"output_logits": True, "return_dict_in_generate": True}, "output_logits=True"),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
    "output_hidden_states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states=True",
    ),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "guidance_scale": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
    "dola_layers": ({"dola_layers": "low"}, "dola_layers='low'"),
    "synced_gpus": ({"synced_gpus": True}, "synced_gpus=True"),
    "temprature": ({"temprature": 0.5}, "temprature"),
}


@DECODERS
@pytest.mark.parametrize("name", REQUESTS)
def test_settings_that_no_decoder_honours(shared_model, prompts, assert_refused, decoder, name):
    arguments, message = REQUESTS[name]
    assert_refused(shared_model("llama"), message, **prompts(5), max_new_tokens=4, custom_generate=decoder, **arguments)


@DECODERS
@pytest.mark.parametrize("mask", [[[1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 1], [0, 1, 1, 0]]])
def test_prompts_padded_on_the_right(shared_model, assert_refused, decoder, mask):
    arguments = {"input_ids": torch.full((len(mask), 4), 5), "attention_mask": torch.tensor(mask), "max_new_tokens": 4}
    message = f"prompt {len(mask) - 1} is padded on the right.*padding_side='left'"
    assert_refused(shared_model("llama"), message, custom_generate=decoder, **arguments)


def test_a_gap_inside_a_prompt_is_no_padding_on_the_right(shared_model):
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 0, 1, 0, 1, 1]])
    inputs = {"input_ids": torch.arange(10, 22).view(2, 6), "attention_mask": mask, "max_new_tokens": 9}
    stock = shared_model("llama").generate(**inputs, do_sample=False)
    assert torch.equal(shared_model("llama").generate(**inputs, do_sample=False, custom_generate=NTP), stock)


@DECODERS
def test_an_assistant_model(shared_model, prompts, assert_refused, decoder):
    model, assistant = shared_model("llama"), shared_model("llama-tied")
    arguments = {"assistant_model": assistant, "max_new_tokens": 4}
    assert_refused(model, "assistant_model", **prompts(5), custom_generate=decoder, **arguments)


@DECODERS
@pytest.mark.parametrize("batch", [1, 2])
def test_an_empty_prompt(shared_model, prompts, assert_refused, decoder, batch):
    model = shared_model("llama")
    inputs = prompts(*[5] * batch)
    inputs["attention_mask"][-1] = 0
    message = f"prompt {batch - 1} is empty"
    assert_refused(model, message, **inputs, max_new_tokens=4, custom_generate=decoder)


@DECODERS
def test_no_token_at_all(shared_model, assert_refused, decoder):
    nothing = torch.zeros(1, 0, dtype=torch.long)
    assert_refused(shared_model("llama"), "empty", input_ids=nothing, max_new_tokens=4, custom_generate=decoder)


@DECODERS
@pytest.mark.parametrize("length", [256, 300])
def test_a_prompt_that_fills_the_context(shared_model, prompts, assert_refused, decoder, length):
    message = rf"prompt 1 has {length} tokens.*\(max_position_embeddings\) is 256"
    assert_refused(shared_model("llama"), message, **prompts(5, length), max_new_tokens=4, custom_generate=decoder)


@DECODERS
def test_embeddings_instead_of_tokens(shared_model, assert_refused, decoder):
    model = shared_model("llama")
    embeddings = model.get_input_embeddings()(torch.arange(5)[None])
    assert_refused(model, "inputs_embeds", inputs_embeds=embeddings, max_new_tokens=4, custom_generate=decoder)


@DECODERS
def test_a_foreign_cache_with_content(shared_model, prompts, assert_refused, decoder):
    model, inputs = shared_model("llama"), prompts(8)
    cache = DynamicCache(config=model.config)
    model(inputs["input_ids"][:, :5], past_key_values=cache, use_cache=True)
    arguments = {"past_key_values": cache, "max_new_tokens": 4, "custom_generate": decoder}
    assert_refused(model, "cannot use past_key_values of type DynamicCache", **inputs, **arguments)
    assert cache.get_seq_length() == 5


@DECODERS
def test_a_slot_cache_for_a_batch(shared_model, prompts, assert_refused, decoder):
    model = shared_model("llama")
    for size, batch in ((1, 2), (2, 1)):
        arguments = {"past_key_values": SlotCache(2, size), "max_new_tokens": 4, "custom_generate": decoder}
        assert_refused(model, "past_key_values: a SlotCache", **prompts(*[5] * batch), **arguments)


@DECODERS
@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_of_another_number_of_layers(shared_model, prompts, assert_refused, decoder, layers):
    arguments = {"past_key_values": SlotCache(layers), "max_new_tokens": 4, "custom_generate": decoder}
    message = f"past_key_values: a SlotCache of {layers} layers, but the model has 2"
    assert_refused(shared_model("llama"), message, **prompts(5), **arguments)


@DECODERS
def test_a_streamer_for_a_batch(shared_model, prompts, decoder, recording_streamer):
    arguments = {"max_new_tokens": 4, "custom_generate": decoder, "streamer": recording_streamer}
    with pytest.raises(ValueError, match="streamer works with one sequence at a time, got a batch of 2"):
        shared_model("llama").generate(**prompts(5, 6), **arguments)
    assert recording_streamer.texts("end") == []


def test_logprobs_of_a_decoder_that_has_none(shared_model, prompts, assert_refused):
    arguments = {"output_logprobs": True, "max_new_tokens": 4, "custom_generate": SBD}
    assert_refused(shared_model("llama"), "SetBlockDecoder.*output_logprobs=True", **prompts(5), **arguments)


BLIND = {
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
    "bad_words_ids": ({"bad_words_ids": [[3, 4]]}, "NoBadWordsLogitsProcessor"),
    "prefix_allowed_tokens_fn": ({"prefix_allowed_tokens_fn": lambda b, ids: [3]}, "PrefixConstrainedLogitsProcessor"),
    "logits_processor": (
        {"logits_processor": LogitsProcessorList([processors.SuppressTokensAtBeginLogitsProcessor([3], 5)])},
        "SuppressTokensAtBeginLogitsProcessor",
    ),
}


@pytest.mark.parametrize("name", BLIND)
def test_processors_that_need_a_left_context_without_holes(shared_model, prompts, assert_refused, name):
    arguments, message = BLIND[name]
    message = f"SetBlockDecoder cannot honour {message}.*SelfSpeculativeDecoder and NextTokenDecoder can"
    assert_refused(shared_model("llama"), message, **prompts(5), max_new_tokens=4, custom_generate=SBD, **arguments)


@pytest.mark.parametrize("value", [97, -1, "<mask>"])
def test_a_mask_token_outside_the_vocabulary(fresh_model, prompts, assert_refused, value):
    model = fresh_model("llama")
    message = f"mask_token_id must be a whole number from 0 to 96, got {value!r}"
    decoder = SetBlockDecoder(mask_token_id=value)
    assert_refused(model, message, **prompts(5), max_new_tokens=4, custom_generate=decoder)
    model.generation_config.mask_token_id = value
    assert_refused(model, message, **prompts(5), max_new_tokens=4, custom_generate=SBD)


def test_no_mask_token(fresh_model, prompts, assert_refused):
    model = fresh_model("llama")
    del model.generation_config.mask_token_id
    assert_refused(
        model, "mask_token_id: this model has no mask token", **prompts(5), max_new_tokens=4, custom_generate=SBD
    )


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True])
def test_impossible_block_sizes(size):
    with pytest.raises(ValueError, match=f"block_size must be a whole number of at least 1, got {size!r}"):
        SetBlockDecoder(block_size=size)


@pytest.mark.parametrize("size", [5, 17])
def test_an_untrained_block_size_warns(fresh_model, prompts, size):
    model = fresh_model("llama")
    model.generation_config.trained_block_sizes = [2, 4, 16]
    message = f"block_size={size}: this model was trained with block sizes 2 to 16"
    with pytest.warns(UserWarning, match=message):
        model.generate(**prompts(5), max_new_tokens=3, custom_generate=SetBlockDecoder(block_size=size))


@pytest.mark.parametrize(("trained", "size"), [([2, 4, 16], 4), ([2, 4, 16], 1), (None, 5)])
def test_a_trained_block_size_does_not_warn(fresh_model, prompts, trained, size):
    model = fresh_model("llama")
    if trained:
        model.generation_config.trained_block_sizes = trained
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model.generate(**prompts(5), max_new_tokens=3, custom_generate=SetBlockDecoder(block_size=size))
    assert output.shape == (1, 8)
    assert not [w for w in caught if "block_size" in str(w.message)]


@DECODERS
def test_text_beyond_the_context_is_warned_of(shared_model, prompts, decoder):
    model, inputs = shared_model("llama"), prompts(250, 9)
    with pytest.warns(UserWarning, match="may reach 270 tokens, more than the model's context of 256"):
        model.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, max_new_tokens=6, do_sample=False, custom_generate=decoder)
