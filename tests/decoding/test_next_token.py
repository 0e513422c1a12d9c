"""Next-token decoding: token for token what transformers generates, and its distribution when sampling."""

import itertools

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import logits_process as processors

from decoding import NextTokenDecoder
from tests.conftest import FAMILIES, MASK, chi_square_z

NTP = NextTokenDecoder()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_stock_generate(shared_model, prompts, family):
    model = shared_model(family)
    for lengths in ((9,), (1,), (7, 12, 3)):
        inputs = prompts(*lengths)
        stock = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=30, do_sample=False, custom_generate=NTP), stock)
    assert len(set(stock[0, 12:].tolist())) > 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_equals_stock_generate_for_each_attention(fresh_model, prompts, attention):
    model = fresh_model("qwen2-window")
    model.set_attn_implementation(attention)
    inputs = prompts(5, 14)
    stock = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=NTP), stock)


PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    "min_length": {"min_length": 19, "eos_token_id": list(range(3, 60))},
    "suppress_tokens": {"suppress_tokens": list(range(3, 80))},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(3, 50)]},
    "sequence_bias": {"sequence_bias": [[[7], 20.0], [[7, 8], 30.0]]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda b, ids: [10 * b + 3, 10 * b + 4, 10 * b + 5]},
    "forced_eos_token_id": {"forced_eos_token_id": 2, "eos_token_id": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6), "eos_token_id": 2},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_act_as_in_stock_generate(shared_model, prompts, name):
    model = shared_model("llama")
    inputs = prompts(7, 12, 3)
    arguments = {"max_new_tokens": 20, "do_sample": False, **PROCESSORS[name]}
    stock = model.generate(**inputs, **arguments)
    assert torch.equal(model.generate(**inputs, **arguments, custom_generate=NTP), stock)
    eos = arguments.get("eos_token_id")
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=eos)
    assert not torch.equal(stock, plain)


def test_long_prompts_are_run_in_chunks(shared_model, prompts, monkeypatch):
    model = shared_model("mistral-window")
    inputs = prompts(5, 47, 20)
    stock = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    monkeypatch.setattr("decoding.decoder.PREFILL_CHUNK", 9)
    output = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, custom_generate=NTP, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, stock)
    assert output.prefill_forwards == 5  # 47 tokens: five chunks of 9, then 2 with the first row that decodes
    assert output.forwards.tolist() == [8, 8, 8]


def test_one_token_per_forward(shared_model, prompts):
    model = shared_model("llama")
    output = model.generate(
        **prompts(4, 9), max_new_tokens=7, do_sample=False, custom_generate=NTP, return_dict_in_generate=True
    )
    assert output.forwards.tolist() == [7, 7] and output.new_tokens.tolist() == [7, 7]
    assert output.tokens_per_forward.tolist() == [1.0, 1.0]
    assert output.trace == ([1, 2, 3, 4, 5, 6, 7],) * 2
    assert output.logprobs is None and output.acceptance_lengths is None


def test_logprobs_are_those_of_a_plain_forward(shared_model, prompts, new_tokens):
    model = shared_model("qwen3")
    inputs = prompts(6, 11)
    output = model.generate(
        **inputs,
        max_new_tokens=9,
        do_sample=True,
        temperature=2.0,
        top_k=20,
        eos_token_id=list(range(3, 30)),
        custom_generate=NTP,
        return_dict_in_generate=True,
        output_logprobs=True,
    )
    assert len(set(output.new_tokens.tolist())) == 2
    for i, length in enumerate((6, 11)):
        text = inputs["input_ids"][i, 11 - length :].tolist() + new_tokens(output, i, 11)
        with torch.no_grad():
            distribution = model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        expected = torch.stack([distribution[t - 1, text[t]] for t in range(length, len(text))])
        torch.testing.assert_close(output.logprobs[i, : len(expected)], expected, atol=1e-4, rtol=1e-4)
        assert output.logprobs[i, len(expected) :].isnan().all()


# Distributions on a vocabulary of six tokens, where all texts of a length can be enumerated.

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3, "temperature": 1.7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15, "temperature": 1.5},
    "repetition_penalty": {"repetition_penalty": 1.7},
}


def warpers(settings: dict) -> LogitsProcessorList:
    """The processors that generate makes of the settings, written out."""
    steps = LogitsProcessorList()
    if "repetition_penalty" in settings:
        steps.append(processors.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "temperature" in settings:
        steps.append(processors.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        steps.append(processors.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        steps.append(processors.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        steps.append(processors.MinPLogitsWarper(settings["min_p"]))
    return steps


def exact_distribution(model, prompt: list[int], length: int, steps: LogitsProcessorList) -> torch.Tensor:
    """Probabilities [V, V, ...] of all texts of ``length`` tokens."""
    vocab = model.config.vocab_size
    distribution = torch.ones([vocab] * length, dtype=torch.float64)
    for depth in range(length):
        for start in itertools.product(range(vocab), repeat=depth):
            ids = torch.tensor([[*prompt, *start]])
            with torch.no_grad():
                scores = steps(ids, model(input_ids=ids).logits[:, -1].clone())
            shape = [vocab] + [1] * (length - depth - 1)
            distribution[start] *= scores[0].double().softmax(-1).reshape(shape)
    return distribution


@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_texts_follow_the_exact_distribution(shared_model, monkeypatch, name):
    monkeypatch.setattr("decoding.forward.cache.GROWTH", 4)  # thousands of sequences, each a few tokens long
    model = shared_model("llama", vocab_size=6, initializer_range=0.2)
    prompt, length, count = [3, 1], 2, 1000
    torch.manual_seed(11)
    arguments = {"top_k": 0, **SETTINGS[name]}
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        do_sample=True,
        max_new_tokens=length,
        num_return_sequences=count,
        custom_generate=NTP,
        **arguments,
    )
    assert output.shape == (count, 4)
    distribution = exact_distribution(model, prompt, length, warpers(SETTINGS[name]))
    assert chi_square_z(output[:, 2:], distribution) < 3.8
    other = exact_distribution(model, prompt, length, warpers({"temperature": 0.8}))
    assert chi_square_z(output[:, 2:], other) > 6


def test_sampling_follows_the_seed(shared_model, prompts):
    model = shared_model("llama")

    def sample(seed: int) -> list:
        torch.manual_seed(seed)
        return model.generate(
            **prompts(5, 9), do_sample=True, max_new_tokens=10, custom_generate=NTP, num_return_sequences=2
        ).tolist()

    first = sample(1)
    assert first == sample(1) and first != sample(2)
    assert first[0] != first[1]


def test_a_cache_that_would_stay_empty_is_refused(shared_model, prompts):
    model = shared_model("llama")
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="past_key_values of type DynamicCache, which would stay as it is"):
        model.generate(**prompts(6), max_new_tokens=4, past_key_values=cache, custom_generate=NTP)


def test_next_token_decoding_needs_no_mask_token(fresh_model, prompts):
    model = fresh_model("llama")
    del model.generation_config.mask_token_id
    model.lm_head.weight[MASK] = 0
    model.lm_head.weight[MASK, 0] = 50.0
    inputs = prompts(6)
    stock = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=NTP), stock)
    assert MASK in stock[0].tolist()
