"""Steered runs around every decoder: one particle is the decoder itself, copies go on as their ancestors, prompts apart."""

import copy

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import decoding.decoder
from decoding import NextTokenDecoder
from decoding.forward.cache import SlotCache
from dfm import FlowDecoder
from rpt import ResampleConfig, ResampleDecoder, attach_offset_code
from sbd import EntropyBound, Remask, SelfSpeculativeDecoder, SetBlockDecoder
from steering import SteeredDecoder, population
from steering.population import Population
from tests.conftest import build

DECODERS = {
    "ntp": NextTokenDecoder(),
    "sbd": SetBlockDecoder(block_size=4, rule=EntropyBound(1.0)),
    "sbd-prefix": SetBlockDecoder(block_size=4, rule=EntropyBound(1.0), commit="prefix"),
    "sbd-remask": SetBlockDecoder(block_size=4, rule=EntropyBound(1.0), revision=Remask()),
    "sbd-lossless": SelfSpeculativeDecoder(block_size=4),
    "prompt-lookup": SelfSpeculativeDecoder(block_size=4, draft="prompt_lookup"),
    "rpt": ResampleDecoder(iterations=0.5),
    "rpt-long": ResampleDecoder(iterations=1.5, window=3, redraw="if_changed"),
    "dfm": FlowDecoder(block_size=4, steps=3),
    "dfm-topk": FlowDecoder(block_size=4, steps=3, sampler="topk"),
}
AT_ONCE = FlowDecoder(steps=3)
LOSSLESS = ("ntp", "sbd-lossless", "prompt-lookup")


def model_for(name: str, shared_model):
    if not name.startswith("rpt"):
        return shared_model("llama")
    window = 3 if name == "rpt-long" else 2
    model = build("llama")
    code = attach_offset_code(model, ResampleConfig(window=window)).requires_grad_(False)
    code.table.copy_(torch.randn(code.table.shape, generator=torch.Generator().manual_seed(7)) / code.GAIN)
    return model


def generate(model, inputs, decoder, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 14, "do_sample": True, "top_k": 0, "return_dict_in_generate": True, **settings}
    return model.generate(**inputs, custom_generate=decoder, **settings)


def small_ids(completion_ids, finished):
    return [-0.05 * sum(ids) for ids in completion_ids]


def small_ids_at_the_end(completion_ids):
    return [-0.05 * sum(ids) for ids in completion_ids]


def long_texts(completion_ids, finished):
    return [0.5 * len(ids) for ids in completion_ids]


@pytest.mark.parametrize("name", DECODERS)
def test_one_particle_is_the_decoder_itself(shared_model, prompts, name):
    model, inputs = model_for(name, shared_model), prompts(9, 5)
    for settings in ({}, {"do_sample": False, "top_k": None}):
        plain = generate(model, inputs, DECODERS[name], **settings)
        steered = generate(model, inputs, SteeredDecoder(DECODERS[name], small_ids, particles=1), **settings)
        for field in ("sequences", "forwards", "new_tokens", "trace", "acceptance_lengths", "revisions"):
            assert str(getattr(steered, field)) == str(getattr(plain, field)), field
    assert steered.particles[:, 0].tolist() == steered.sequences.tolist() and (steered.log_weights == 0).all()


def always(ancestors):
    """Resampling that gives these ancestors at every judgement."""
    return lambda log_weights, uniform: list(ancestors)


@pytest.fixture
def with_ancestors_numbers(monkeypatch):
    """Copies draw the numbers that their ancestors draw."""

    def follow(decoder):
        fork = type(decoder).fork

        def forked(self, batch, sequence, source, engine):
            sequence.generator.set_state(source.generator.get_state())
            fork(self, batch, sequence, source, engine)

        monkeypatch.setattr(type(decoder), "fork", forked)

    return follow


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in ("sbd-lossless", "prompt-lookup")])
@pytest.mark.parametrize("every", [4, 3])
def test_a_copy_with_its_ancestors_numbers_goes_on_as_it_does(
    shared_model, prompts, monkeypatch, with_ancestors_numbers, name, every
):
    """State, keys and values are all there, wherever the decoder stands; and the ancestor notices nothing."""
    model, inputs, decoder = model_for(name, shared_model), prompts(9, 5), DECODERS[name]
    plain = generate(model, inputs, SteeredDecoder(decoder, small_ids_at_the_end, particles=3))
    monkeypatch.setattr(population, "systematic", always([0, 0, 2]))
    with_ancestors_numbers(decoder)
    steered = generate(model, inputs, SteeredDecoder(decoder, small_ids, particles=3, every=every, ess_threshold=1.0))
    assert steered.particles[:, 0].tolist() == steered.particles[:, 1].tolist() == plain.particles[:, 0].tolist()
    assert steered.particles[:, 2].tolist() == plain.particles[:, 2].tolist() != plain.particles[:, 1].tolist()
    assert all(any(j.ancestors for j in judgements) for judgements in steered.judgements)
    assert steered.origins[0][1][:8] == [0] * 8


@pytest.mark.parametrize("temperature", [1.0, 0.02])
@pytest.mark.parametrize("name", ["ntp", "sbd", "sbd-prefix", "sbd-remask", "sbd-lossless", "dfm"])
def test_copied_keys_and_values_are_those_of_the_text(shared_model, prompts, monkeypatch, name, temperature):
    """The same draws as when nothing is copied and every copy runs its text anew; also where particles are much alike."""
    model, inputs = shared_model("llama"), prompts(9, 5)
    decoder = SteeredDecoder(DECODERS[name], small_ids, particles=4, every=3, ess_threshold=1.0)
    copies, held = [], []
    original, copy_particle = SlotCache.copy_sequences, Population.copy

    def copied(cache, which, shared):
        copies.append(shared)
        assert shared <= min(held)  # what is not copied was there
        held.clear()
        original(cache, which, shared)

    def noting(self, place, ancestor):
        held.append(self.sequences[place].cached)
        return copy_particle(self, place, ancestor)

    monkeypatch.setattr(SlotCache, "copy_sequences", copied)
    monkeypatch.setattr(Population, "copy", noting)
    shared = generate(model, inputs, decoder, max_new_tokens=24, temperature=temperature)
    assert copies or temperature < 1

    def without_cache(self, place, ancestor):
        sequence = copy_particle(self, place, ancestor)
        sequence.cached = 0
        return sequence

    monkeypatch.setattr(Population, "copy", without_cache)
    monkeypatch.setattr(SlotCache, "copy_sequences", lambda *args: None)
    anew = generate(model, inputs, decoder, max_new_tokens=24, temperature=temperature)
    assert shared.particles.tolist() == anew.particles.tolist()
    torch.testing.assert_close(shared.log_weights, anew.log_weights)


def test_finished_particles_that_are_taken_up_again_get_their_place_back(shared_model, prompts, monkeypatch):
    """Particles end at different times and leave the cache; a place that is given to a running one returns to it."""
    model, inputs = shared_model("llama"), prompts(9)
    ends = list(range(3, 20))
    for name in LOSSLESS:
        decoder = SteeredDecoder(DECODERS[name], long_texts, particles=8, every=2, ess_threshold=1.0)
        reordered = []
        monkeypatch.setattr(SlotCache, "reorder_cache", _noted(SlotCache.reorder_cache, reordered))
        output = generate(model, inputs, decoder, eos_token_id=ends, seed=5, max_new_tokens=20)
        assert any(len(set(places)) < len(places) for places in reordered[1:])
        for row, count in zip(output.particles[0].tolist(), output.particle_tokens[0].tolist(), strict=True):
            new = row[9 : 9 + count]
            assert not set(new[:-1]) & set(ends) and (new[-1] in ends or count == 20)


def _noted(original, calls):
    def noted(self, places):
        calls.append(places.tolist())
        return original(self, places)

    return noted


@pytest.mark.parametrize("name", ["ntp", "sbd-lossless", "sbd"])
def test_prompts_do_not_know_of_each_other(shared_model, prompts, name):
    """Ragged prompts in one batch, each as if it were alone; judged at the same tokens, whoever is faster."""
    model = shared_model("llama")
    decoder = SteeredDecoder(DECODERS[name], small_ids, particles=4, every=4, ess_threshold=0.9)
    together = generate(model, prompts(9, 5), decoder, eos_token_id=list(range(3, 12)))
    alone = generate(model, {"input_ids": prompts(9, 5)["input_ids"][:1]}, decoder, eos_token_id=list(range(3, 12)))
    assert together.particles[0, :, : alone.particles.shape[2]].tolist() == alone.particles[0].tolist()
    torch.testing.assert_close(together.log_weights[0], alone.log_weights[0])
    assert together.judgements[0] == alone.judgements[0] and together.forwards[0] == alone.forwards[0]


def test_the_output_holds_what_it_says(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(9, 5)
    decoder = SteeredDecoder(
        DECODERS["sbd-lossless"], small_ids, particles=4, every=4, ess_threshold=1.0, select="best"
    )
    output = generate(model, inputs, decoder, eos_token_id=list(range(3, 12)), output_logprobs=True)
    width = int(output.new_tokens.max())
    for b in range(2):
        best = int(output.rewards[b].argmax())
        assert output.chosen[b] == best and output.log_weights[b].exp().sum() == pytest.approx(1)
        assert output.sequences[b].tolist() == output.particles[b, best, : 9 + width].tolist()
        assert output.new_tokens[b] == output.particle_tokens[b, best] == len(output.trace[b])
        assert output.logprobs[b].isfinite().sum() == output.new_tokens[b]
        for i in range(4):
            count = int(output.particle_tokens[b, i])
            ids = output.particles[b, i, 9 : 9 + count].tolist()
            assert output.rewards[b, i] == pytest.approx(-0.05 * sum(ids)) and len(output.origins[b][i]) == count
        assert max(output.trace[b]) <= output.forwards[b] < output.particle_forwards[b] <= 4 * output.forwards[b]
    assert sum(len(j) for j in output.judgements) > 2 and "exact as particles grow" in output.target
    again = generate(model, inputs, decoder, eos_token_id=list(range(3, 12)))
    assert again.logprobs is None and again.sequences.tolist() == output.sequences.tolist()


def test_without_a_reward_the_best_is_what_the_model_likes_best(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(9, 5)
    output = generate(model, inputs, SteeredDecoder(alpha=2, particles=4, select="best"), temperature=2.0)
    likely = []
    for row in output.particles.flatten(0, 1):
        real = row[row != 0] if row[0] == 0 else row
        with torch.no_grad():
            logprobs = model(real[None]).logits[0].log_softmax(-1)
        likely.append(sum(float(logprobs[i - 1, real[i]]) for i in range(len(real) - 14, len(real))))
    assert output.chosen.tolist() == torch.tensor(likely).view(2, 4).argmax(-1).tolist()


def test_the_seed_decides_resampling_alone(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(9)

    def ancestors(seed, torch_seed=0):
        decoder = SteeredDecoder(reward=small_ids, particles=6, every=4, ess_threshold=1.0, seed=seed)
        return generate(model, inputs, decoder, seed=torch_seed).judgements[0]

    assert ancestors(1) == ancestors(1)
    assert ancestors(1)[0].ess == ancestors(2)[0].ess and ancestors(1) != ancestors(2)
    assert ancestors(None) == ancestors(None) != ancestors(None, 1)


def test_stop_strings_and_text_rewards(shared_model, prompts, tokenizer):
    model, inputs = shared_model("llama"), prompts(9, 5)
    seen = []

    def short(prompts, completions, prompt_ids, completion_ids, finished, scale=0.1):
        seen.extend(zip(prompts, completions, prompt_ids, completion_ids, finished, strict=True))
        return torch.tensor([-scale * len(text) for text in completions])

    decoder = SteeredDecoder(DECODERS["sbd-lossless"], short, particles=4, every=4)
    stops = list("abcdefghijkl")
    output = generate(model, inputs, decoder, stop_strings=stops, tokenizer=tokenizer, max_new_tokens=16)
    for b, i in [(b, i) for b in range(2) for i in range(4)]:
        text = tokenizer.decode(output.particles[b, i, 9 : 9 + int(output.particle_tokens[b, i])])
        assert not any(stop in text[:-4] for stop in stops)
    for prompt, text, prompt_ids, ids, finished in seen:
        assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == prompt and len(prompt_ids) in (5, 9)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text and (finished or len(ids) % 4 == 0)
    assert {finished for *_, finished in seen} == {True, False}


@pytest.mark.parametrize("name", ["ntp", "sbd-lossless"])
def test_a_streamer_gets_what_all_particles_agree_on_and_then_the_chosen_one(
    shared_model, prompts, recording_streamer, name
):
    model, inputs = shared_model("llama"), prompts(9)
    decoder = SteeredDecoder(DECODERS[name], small_ids, particles=3, every=4, ess_threshold=1.0, scale=4)
    output = generate(model, inputs, decoder, streamer=recording_streamer, max_new_tokens=32)
    put = recording_streamer.texts("put")
    assert sum(put, []) == output.sequences[0].tolist() and len(put) > 2
    assert recording_streamer.calls[-1][0] == "end"


class ByPrompt(LogitsProcessor):
    """Holds a bias [B, V] for each prompt of the user's batch."""

    def __init__(self, bias: torch.Tensor):
        self.bias = bias

    def __call__(self, input_ids, scores):
        return scores + self.bias


class StopsByPrompt(StoppingCriteria):
    """Holds a length for each prompt of the user's batch."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1]) >= self.lengths


@pytest.mark.parametrize("name", ["ntp", "sbd-lossless"])
def test_processors_and_criteria_that_hold_values_by_prompt_see_prompts(shared_model, prompts, name):
    model, inputs = shared_model("llama"), prompts(9, 5)
    bias = torch.full((2, 97), -torch.inf)
    bias[0, [10, 20]] = bias[1, [11, 21]] = 0
    decoder = SteeredDecoder(DECODERS[name], small_ids, particles=3, every=4)
    output = generate(
        model,
        inputs,
        decoder,
        logits_processor=LogitsProcessorList([ByPrompt(bias)]),
        stopping_criteria=StoppingCriteriaList([StopsByPrompt([9 + 5, 9 + 11])]),
    )
    assert output.particle_tokens.tolist() == [[5] * 3, [11] * 3]
    assert set(output.particles[0, :, 9:14].flatten().tolist()) == {10, 20}
    assert set(output.particles[1, :, 9:20].flatten().tolist()) == {11, 21}


def test_what_is_allowed_by_prompt_is_asked_by_prompt(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(9, 5)
    for name in ("ntp", "sbd-lossless"):
        output = generate(
            model,
            inputs,
            SteeredDecoder(DECODERS[name], small_ids, particles=3, every=4),
            prefix_allowed_tokens_fn=lambda prompt, ids: [10 + prompt, 20 + prompt],
        )
        for b in range(2):
            assert set(output.particles[b, :, 9:].flatten().tolist()) == {10 + b, 20 + b}


def test_a_long_prompt_runs_once_for_all_particles(shared_model, prompts, count_rows, monkeypatch):
    monkeypatch.setattr("decoding.decoder.PREFILL_CHUNK", 16)
    model, inputs = shared_model("llama"), prompts(40, 1)
    output = generate(model, inputs, SteeredDecoder(reward=small_ids, particles=5, every=4), max_new_tokens=3)
    assert output.prefill_forwards == 3 and count_rows == [16, 16, 7, 10, 10, 10]


def test_a_flow_over_the_whole_text_is_judged_at_its_end(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(9, 5)
    output = generate(model, inputs, SteeredDecoder(AT_ONCE, small_ids_at_the_end, particles=4))
    assert [len(judgements) for judgements in output.judgements] == [1, 1]
    assert output.forwards.tolist() == [3, 3] and output.particle_forwards.tolist() == [12, 12]


def test_decoders_are_values():
    decoder = SteeredDecoder(DECODERS["sbd"], small_ids)
    assert decoder == copy.copy(decoder) and hash(decoder) == hash(copy.copy(decoder))
    assert isinstance(decoder, decoding.decoder.Decoder) and decoder.needs_mask_token and decoder.rows_ahead == 8
