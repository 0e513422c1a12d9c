"""Models whose forward is not transformers' own: decoded where that makes no difference, refused by name where it does."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from decoding import NextTokenDecoder
from sbd import SelfSpeculativeDecoder, SetBlockDecoder
from tests.conftest import MASK, VOCAB

DECODERS = [NextTokenDecoder(), SelfSpeculativeDecoder(4), SelfSpeculativeDecoder(6, draft="prompt_lookup")]
DIFFERS = "cannot be decoded: its logits through our masks and cache differ"


def greedy(model, inputs, decoder=None):
    settings = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [MASK]}
    return model.generate(**inputs, custom_generate=decoder, **settings)


def assert_decoded(model, inputs):
    stock = greedy(model, inputs)
    for decoder in DECODERS:
        assert torch.equal(greedy(model, inputs, decoder), stock)


def assert_refused(model, inputs, message=DIFFERS):
    for decoder in (*DECODERS, SetBlockDecoder(4)):
        with pytest.raises(ValueError, match=message):
            greedy(model, inputs, decoder)


def flipped(module, arguments, output):
    output.logits = output.logits.flip(-1)
    return output


def shifted(module, arguments, named):
    return arguments, {**named, "input_ids": (named["input_ids"] + 1) % 90}


class Flipped(LlamaForCausalLM):
    def forward(self, *arguments, **named):
        return flipped(self, arguments, super().forward(*arguments, **named))


class Same(LlamaForCausalLM):
    pass


class Prepared(Qwen3ForCausalLM):
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, use_cache=None, **named):
        named |= {"attention_mask": attention_mask, "use_cache": use_cache}
        inputs = super().prepare_inputs_for_generation(input_ids, **named)
        return inputs | {"input_ids": (inputs["input_ids"] + 1) % 90}


def of_class(model, kind):
    model.__class__ = kind
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_hooks_around_the_whole_model(fresh_model, prompts, family):
    model, inputs = fresh_model(family), prompts(7, 4, 9)
    assert_decoded(model, inputs)
    for register, hook in (
        (model.register_forward_hook, flipped),
        (lambda hook: model.register_forward_pre_hook(hook, with_kwargs=True), shifted),
    ):
        handle = register(hook)
        assert_refused(model, inputs)  # though the model was decoded before
        handle.remove()
        assert_decoded(model, inputs)
    model.register_forward_hook(lambda module, arguments, output: None)
    assert_decoded(model, inputs)


def test_a_forward_that_was_replaced(fresh_model, prompts):
    for family in ("llama", "qwen3"):
        model = fresh_model(family)
        original = model.forward
        model.forward = lambda *a, original=original, **named: flipped(None, a, original(*a, **named))
        assert_refused(model, prompts(7, 4))


def test_classes_of_ones_own(fresh_model, prompts):
    assert_decoded(of_class(fresh_model("llama"), Same), prompts(7, 4))
    assert_refused(of_class(fresh_model("llama"), Flipped), prompts(7, 4))
    model = of_class(fresh_model("qwen3"), Prepared)
    assert not torch.equal(greedy(model, prompts(7)), greedy(fresh_model("qwen3"), prompts(7)))
    assert_refused(model, prompts(7, 4), "prepare_inputs_for_generation of the model was replaced")


def test_a_model_that_is_right_alone_and_wrong_in_a_ragged_batch(prompts):
    """GPT-Neo takes its window by where a row lies in the forward, which is not always the end."""
    config = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(
        GPTNeoConfig(vocab_size=VOCAB, window_size=8, eos_token_id=None, pad_token_id=0, **config)
    )
    model.generation_config.mask_token_id = MASK
    assert_refused(model.eval(), prompts(7), f"model_type='gpt_neo' {DIFFERS}")


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
HYBRID = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HYBRID |= {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
OTHERS = {
    "t5": (lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **T5)), "an encoder-decoder"),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, **BART)), "an encoder-decoder"),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)),
        "a recurrent state",
    ),
    "jamba": (lambda: JambaForCausalLM(JambaConfig(vocab_size=VOCAB, **HYBRID)), "a recurrent state"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_of_models_are_told_by_what_they_are(prompts, count_rows, name):
    make, reason = OTHERS[name]
    for decoder in (NextTokenDecoder(), SetBlockDecoder(4, mask_token_id=MASK)):
        with pytest.raises(ValueError, match=f"model_type='{name}' cannot be decoded: .*{reason}"):
            make().eval().generate(**prompts(6), max_new_tokens=4, custom_generate=decoder)
    assert not count_rows
