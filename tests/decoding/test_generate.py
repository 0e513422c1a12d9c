"""What ``model.generate(..., custom_generate=decoder)`` honours: limits, stops, batches, settings, caches."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from decoding import NextTokenDecoder, SlotCache
from sbd import ConfidenceFactor, EntropyBound, SetBlockDecoder, TopK

NTP = NextTokenDecoder()
SBD = SetBlockDecoder(block_size=5, rule=TopK(2))
DECODERS = pytest.mark.parametrize("decoder", [NTP, SBD], ids=["ntp", "sbd"])
FULL = {"return_dict_in_generate": True, "do_sample": False}


class StopAtLength(StoppingCriteria):
    """Stops at a number of tokens and keeps every text it was asked about."""

    def __init__(self, length: int):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids[0].tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@DECODERS
def test_fewer_new_tokens_are_a_prefix_of_more(shared_model, prompts, decoder):
    model, inputs = shared_model("llama"), prompts(6)
    longest = model.generate(**inputs, max_new_tokens=17, custom_generate=decoder, do_sample=False)
    for count in (1, 2, 4, 5, 6, 11, 16):
        output = model.generate(**inputs, max_new_tokens=count, custom_generate=decoder, **FULL)
        assert torch.equal(output.sequences, longest[:, : 6 + count])
        assert output.new_tokens.tolist() == [count] == [len(output.trace[0])]
        assert output.forwards.item() == max(output.trace[0])


@DECODERS
def test_max_length_counts_prompt_and_padding_as_stock_does(shared_model, prompts, decoder):
    model = shared_model("llama")
    output = model.generate(**prompts(4, 9), max_length=15, custom_generate=decoder, **FULL)
    assert output.sequences.shape == (2, 15) and output.new_tokens.tolist() == [6, 6]


@DECODERS
def test_settings_of_a_generation_config(shared_model, prompts, decoder):
    model, inputs = shared_model("llama"), prompts(6)
    config = GenerationConfig(max_new_tokens=9, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    config.mask_token_id = 96
    output = model.generate(**inputs, generation_config=config, custom_generate=decoder)
    assert torch.equal(
        output.sequences, model.generate(**inputs, max_new_tokens=9, do_sample=False, custom_generate=decoder)
    )


@DECODERS
@pytest.mark.parametrize("wanted", [0, 3, 4, 7, 12])
def test_the_first_of_several_eos_ids_ends_the_text(shared_model, prompts, decoder, wanted):
    model, inputs = shared_model("llama"), prompts(6)
    free = model.generate(**inputs, max_new_tokens=16, custom_generate=decoder, **FULL)
    text = free.sequences[0, 6:].tolist()
    end = text.index(text[wanted]) + 1
    later = next(token for token in reversed(text) if token not in text[:end])
    output = model.generate(
        **inputs, max_new_tokens=16, custom_generate=decoder, eos_token_id=[text[wanted], later], **FULL
    )
    assert output.sequences[0, 6:].tolist() == text[:end]
    assert output.new_tokens.item() == end
    assert output.trace[0] == free.trace[0][:end]
    assert output.forwards.item() == max(output.trace[0]) <= max(free.trace[0])
    assert output.tokens_per_forward.item() == pytest.approx(end / output.forwards.item())


@DECODERS
def test_sequences_end_at_different_times_and_are_padded(shared_model, prompts, decoder, new_tokens):
    model, lengths = shared_model("llama"), (6, 9, 3, 6)
    inputs = prompts(*lengths)
    arguments = {"max_new_tokens": 14, "eos_token_id": list(range(3, 12)), "custom_generate": decoder, **FULL}
    output = model.generate(**inputs, **arguments)
    assert len(set(output.new_tokens.tolist())) > 2
    for i, length in enumerate(lengths):
        count = int(output.new_tokens[i])
        assert output.sequences[i, 9 + count :].eq(0).all()
        alone = model.generate(inputs["input_ids"][i : i + 1, 9 - length :], **arguments)
        assert new_tokens(output, i, 9) == alone.sequences[0, length:].tolist()
        assert output.trace[i] == alone.trace[0] and output.forwards[i] == alone.forwards[0]


@DECODERS
def test_stop_strings_end_the_text_at_the_token_that_completes_them(shared_model, prompts, tokenizer, decoder):
    model, inputs = shared_model("llama"), prompts(6)
    free = model.generate(**inputs, max_new_tokens=16, custom_generate=decoder, **FULL)
    text = free.sequences[0, 6:].tolist()
    for last in (4, 7, 11):
        stop = tokenizer.decode(text[last - 1 : last + 1])
        output = model.generate(
            **inputs, max_new_tokens=16, stop_strings=[stop], tokenizer=tokenizer, custom_generate=decoder, **FULL
        )
        new = output.sequences[0, 6:].tolist()
        assert new == text[: len(new)] and len(new) <= last + 1
        assert stop in tokenizer.decode(new) and stop not in tokenizer.decode(new[:-1])
        assert output.trace[0] == free.trace[0][: len(new)]


def test_stop_strings_end_the_text_where_stock_ends_it(shared_model, prompts, tokenizer):
    model, inputs = shared_model("llama"), prompts(6)
    text = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, 6:].tolist()
    arguments = {"max_new_tokens": 16, "do_sample": False, "tokenizer": tokenizer}
    arguments["stop_strings"] = [tokenizer.decode(text[9:11]), tokenizer.decode(text[5:6])]
    stock = model.generate(**inputs, **arguments)
    assert stock.shape[1] < 6 + 16
    assert torch.equal(model.generate(**inputs, **arguments, custom_generate=NTP), stock)


@DECODERS
def test_a_stopping_criterion_sees_every_committed_prefix_once(shared_model, prompts, decoder):
    model, inputs = shared_model("llama"), prompts(6)
    free = model.generate(**inputs, max_new_tokens=16, do_sample=False, custom_generate=decoder)[0].tolist()
    criterion = StopAtLength(14)
    output = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, custom_generate=decoder, stopping_criteria=[criterion]
    )
    assert output[0].tolist() == free[:14]
    assert criterion.asked == [free[:n] for n in range(7, 15)]


@pytest.mark.parametrize("criterion", [StopAtLength(15), MaxLengthCriteria(17)], ids=["own", "MaxLengthCriteria"])
def test_a_criterion_counts_the_padding_as_in_stock_generate(shared_model, prompts, criterion):
    model, inputs = shared_model("llama"), prompts(6, 11, 3)
    arguments = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": [criterion]}
    stock = model.generate(**inputs, **arguments)
    assert stock.shape[1] < 11 + 12
    assert torch.equal(model.generate(**inputs, **arguments, custom_generate=NTP), stock)


@DECODERS
@pytest.mark.parametrize("make", [lambda text: EosTokenCriteria(text[4]), lambda text: MaxLengthCriteria(9)])
def test_criteria_of_the_kinds_that_generate_makes_itself(shared_model, prompts, decoder, make):
    model, inputs = shared_model("llama"), prompts(6)
    text = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=decoder)[0, 6:].tolist()
    criterion = make(text)
    output = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, custom_generate=decoder, stopping_criteria=[criterion]
    )
    expected = text[:3] if isinstance(criterion, MaxLengthCriteria) else text[: text.index(text[4]) + 1]
    assert output[0, 6:].tolist() == expected


@DECODERS
def test_batched_equals_one_by_one(shared_model, prompts, decoder, new_tokens):
    model, lengths = shared_model("qwen3", torch.float64), (3, 11, 7)
    inputs = prompts(*lengths)
    output = model.generate(**inputs, max_new_tokens=13, custom_generate=decoder, **FULL)
    assert torch.equal(output.sequences[:, :11], inputs["input_ids"])
    for i, length in enumerate(lengths):
        prompt = inputs["input_ids"][i][inputs["attention_mask"][i].bool()]
        assert len(prompt) == length
        alone = model.generate(prompt[None], max_new_tokens=13, custom_generate=decoder, **FULL)
        assert new_tokens(output, i, 11) == alone.sequences[0, length:].tolist()
        assert output.trace[i] == alone.trace[0]


SAMPLING = ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 3.0, "top_k": 0})


@DECODERS
@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_sampling_follows_seed_and_settings(shared_model, prompts, decoder, settings):
    model = shared_model("llama")

    def sample(seed: int, **overrides) -> list[list[int]]:
        torch.manual_seed(seed)
        arguments = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 2, **settings, **overrides}
        return model.generate(**prompts(5), custom_generate=decoder, **arguments)[:, 5:].tolist()

    texts = sample(1)
    assert texts == sample(1) != sample(2)
    assert texts[0] != texts[1] and all(96 not in text for text in texts)
    assert texts != sample(1, temperature=0.05)


@DECODERS
def test_sampling_from_one_token_is_greedy(shared_model, prompts, decoder):
    model, inputs = shared_model("llama"), prompts(5, 8)
    greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=decoder)
    if decoder is SBD:  # the distribution cut to one token has no entropy and no rank, so measure before the cut
        decoder = SetBlockDecoder(block_size=5, rule=TopK(2), entropy_from="raw")
    sampled = model.generate(**inputs, max_new_tokens=12, do_sample=True, top_k=1, custom_generate=decoder)
    assert torch.equal(sampled, greedy)


def test_a_sequence_draws_the_same_in_any_batch(shared_model, prompts):
    model = shared_model("llama", torch.float64)
    arguments = {"do_sample": True, "max_new_tokens": 12, "temperature": 1.5}
    for decoder in (NTP, SBD):
        texts = []
        for lengths in ((6,), (6, 9), (6, 4, 11)):
            torch.manual_seed(4)
            inputs = prompts(*lengths)
            output = model.generate(**inputs, **arguments, custom_generate=decoder)
            texts.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        assert texts[0] == texts[1] == texts[2]


def test_several_sequences_are_returned_for_each_prompt(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(5, 8)
    output = model.generate(
        **inputs,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=6,
        custom_generate=SBD,
        return_dict_in_generate=True,
    )
    assert output.sequences.shape == (6, 14) and len(output.trace) == 6
    assert torch.equal(output.sequences[:, :8], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in output.sequences[:3].tolist()}) == 3


def test_the_output_counts_forwards_and_tokens(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(6, 9)
    output = model.generate(**inputs, max_new_tokens=12, custom_generate=SBD, **FULL)
    assert output.sequences.shape == (2, 21) and output.new_tokens.tolist() == [12, 12]
    assert output.prefill_forwards == 0 and output.logprobs is None
    for trace, forwards, rate in zip(output.trace, output.forwards, output.tokens_per_forward, strict=True):
        # blocks of 5 in three forwards each; of the third only the two tokens that fit are counted
        assert sorted(trace[:5]) == [1, 1, 2, 2, 3] and sorted(trace[5:10]) == [4, 4, 5, 5, 6]
        assert forwards == max(trace) and rate.item() == pytest.approx(12 / forwards.item())
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=SBD)
    assert torch.equal(plain, output.sequences)


KEPT = [
    NTP,
    SBD,
    SetBlockDecoder(block_size=4, rule=EntropyBound(1.0), anchor=True),
    SetBlockDecoder(8, ConfidenceFactor(9)),
]


@pytest.mark.parametrize("decoder", KEPT, ids=str)
def test_a_cache_kept_between_turns_gives_the_same_text_with_fewer_rows(
    shared_model, prompts, count_rows, cache_error, decoder
):
    model = shared_model("qwen3", torch.float64)
    cache = SlotCache(model.config.num_hidden_layers)
    text = prompts(20)["input_ids"]
    for turn in range(3):
        arguments = {"max_new_tokens": 9, "do_sample": False, "custom_generate": decoder}
        count_rows.clear()
        expected = model.generate(text, **arguments)
        rows_without = sum(count_rows)
        count_rows.clear()
        output = model.generate(text, **arguments, past_key_values=cache)
        rows_with = sum(count_rows)
        assert torch.equal(output, expected)
        held = cache.tokens[0]
        assert held == output[0, :-1].tolist()
        assert cache_error(model, cache, 0, held) < 1e-10
        if turn:
            assert rows_without - rows_with >= text.shape[1] - 6 - decoder_rows(decoder)
        text = torch.cat([output, prompts(5, seed=turn)["input_ids"]], 1)


def decoder_rows(decoder) -> int:
    """Rows that finishing the cache may cost: the tokens of the last block, run once more as text."""
    return getattr(decoder, "block_size", 0)


def test_a_kept_cache_forgets_what_was_edited(shared_model, prompts, count_rows):
    model, cache = shared_model("llama", torch.float64), SlotCache(2)
    text = prompts(20)["input_ids"]
    model.generate(text, max_new_tokens=9, do_sample=False, custom_generate=SBD, past_key_values=cache)
    edited = text.clone()
    edited[0, 13] = (edited[0, 13] + 1) % 90 + 3
    expected = model.generate(edited, max_new_tokens=9, do_sample=False, custom_generate=SBD)
    count_rows.clear()
    output = model.generate(edited, max_new_tokens=9, do_sample=False, custom_generate=SBD, past_key_values=cache)
    assert torch.equal(output, expected)
    assert count_rows[0] == 20 - 13 + 5
    same = model.generate(edited, max_new_tokens=9, do_sample=False, custom_generate=SBD, past_key_values=cache)
    assert torch.equal(same, expected)


def test_calls_without_a_decoder_are_stock(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(6)
    seen = {}

    def own(model, input_ids, stopping_criteria, flavour=None, **prepared):
        seen.update(flavour=flavour, streamer=prepared.get("streamer"))
        return input_ids

    assert torch.equal(
        model.generate(**inputs, custom_generate=own, flavour="x", streamer=Quiet()), inputs["input_ids"]
    )
    assert seen == {"flavour": "x", "streamer": None}


class Quiet:
    def put(self, value):
        pass

    def end(self):
        pass
