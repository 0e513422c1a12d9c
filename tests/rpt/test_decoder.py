"""ResampleDecoder on tiny random models: rows, cache, batches, stops, streaming, and what it refuses."""

import dataclasses
import itertools

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper

from decoding import Engine, NextTokenDecoder, SlotCache, decoder_from_spec
from decoding.batch import Batch, Sequence, Stopping
from decoding.decoder import decode
from decoding.forward.rows import RowList
from decoding.sampling import LogitsPipeline
from decoding.training.packed import Packing
from rpt import ResampleDecoder, ResampleObjective
from rpt.config import ResampleConfig
from rpt.permutation import reordered
from rpt.previous_rows import AcceptRule, add_previous_rows
from tests.conftest import FAMILIES, MASK
from tests.rpt.toys import TableEngine

DICT = {"return_dict_in_generate": True}
SAMPLED = {"do_sample": True, "top_k": 0}
TRAININGS = list(itertools.product(("slot", "token"), ("follow", "ntp"), ("input", "layers")))


def uncached_previous(model, config: ResampleConfig, tokens: list[int], i: int, window: int) -> torch.Tensor:
    """Logits of the row that predicts token i in an uncached run of the reordered text, as it was trained."""
    order = [*range(i), *range(i + 1, i + window), i]
    sigma = torch.tensor([order])
    ids = torch.tensor([tokens[: i + window]])
    packing = Packing.from_document_ids(torch.zeros_like(ids))
    objective = ResampleObjective(**config.as_dict())
    hidden = objective.trunk(model, ids, packing, reordered(packing, sigma, config.prev_target))
    return model.get_output_embeddings()(hidden[0, i + window - 2])


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(("rope_index", "prev_target", "code_at"), TRAININGS)
def test_rows_of_the_two_slot_forward(resample_model, rope_index, prev_target, code_at, window):
    """The next-token row equals the plain forward; the previous-token row an uncached run of the reordered text."""
    config = ResampleConfig(window, rope_index=rope_index, prev_target=prev_target, code_at=code_at)
    model = resample_model("llama", **config.as_dict())
    tokens = list(range(20, 34))
    i = len(tokens) - window
    engine, known = Engine(model), len(tokens) - 1
    cache = engine.new_cache(1)
    first, second = RowList(), RowList()
    first.add_causal(tokens[:known], 0)
    engine.step([first], cache)
    causal = second.add_causal(tokens[known:], known)
    added = add_previous_rows(second, tokens, i, window, config, len(tokens), config.prev_target == "follow")
    logits = engine.step([second], cache).logits([(0, causal[-1:]), (0, added[-1:])])
    plain = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert torch.allclose(logits[0], plain, atol=1e-4)
    assert torch.allclose(logits[1], uncached_previous(model, config, tokens, i, window), atol=1e-4)
    # The control: the row before the window must be as it was trained.
    other = RowList()
    other.add_causal(tokens[known:], known)
    added = add_previous_rows(other, tokens, i, window, config, len(tokens), config.prev_target != "follow")
    wrong = engine.step([other], cache).logits([(0, added[-1:])])
    assert not torch.allclose(wrong[0], logits[1], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_iterations_are_ordinary_generation(shared_model, prompts, family):
    model, inputs = shared_model(family), prompts(5, 12)
    decoder = ResampleDecoder(iterations=0)
    output = model.generate(**inputs, max_new_tokens=20, custom_generate=decoder, **DICT)
    assert torch.equal(output.sequences, model.generate(**inputs, max_new_tokens=20, do_sample=False))
    assert output.tokens_per_forward.tolist() == [1.0, 1.0]
    texts = []
    for either in (decoder, NextTokenDecoder()):
        torch.manual_seed(3)
        texts.append(model.generate(**inputs, max_new_tokens=20, custom_generate=either, **SAMPLED))
    assert torch.equal(*texts)


def brute_force(model, config, prompt: list[int], decoder: ResampleDecoder, count: int) -> list[int]:
    """The algorithm of the paper for w = 2, greedy, written out on uncached runs of whole texts."""

    def next_token(text):
        return int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())

    text = list(prompt)
    text.append(next_token(text))
    for _ in range(count - 1):
        text.append(next_token(text))
        i = len(text) - 2
        for half in range(1, round(2 * decoder.iterations) + 1):
            if half % 2:
                distribution = uncached_previous(model, config, text, i, 2).softmax(-1)
                if decoder.accept == "gibbs" or distribution.max() >= decoder.threshold:
                    text[i] = int(distribution.argmax())
            else:
                text[i + 1] = next_token(text[: i + 1])
    return text[len(prompt) :]


@pytest.mark.parametrize("k", [0.5, 1, 1.5])
@pytest.mark.parametrize("accept", ["gibbs", "argmax_threshold"])
@pytest.mark.parametrize("schedule", ["two_slot", "plain"])
@pytest.mark.parametrize("prev_target", ["follow", "ntp"])
def test_text_is_that_of_the_algorithm_without_a_cache(resample_model, k, accept, schedule, prev_target):
    model = resample_model(prev_target=prev_target)
    config = ResampleConfig(prev_target=prev_target)
    decoder = ResampleDecoder(iterations=k, accept=accept, threshold=0.6, schedule=schedule)
    prompt = list(range(30, 37))
    output = model.generate(torch.tensor([prompt]), max_new_tokens=24, custom_generate=decoder, do_sample=False, **DICT)
    assert output.sequences[0, 7:].tolist() == brute_force(model, config, prompt, decoder, 24)
    assert sum(output.revisions[0]) > 0


@pytest.mark.parametrize("family", ["qwen2", "mistral-window"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20}])
def test_batched_equals_single(resample_model, prompts, new_tokens, family, settings):
    """Ragged prompts, different branches, sequences that end at different times."""
    model, inputs = resample_model(family), prompts(4, 17, 9)
    for decoder in (ResampleDecoder(iterations=1), ResampleDecoder(accept="argmax_threshold", threshold=0.5)):
        alone = []
        for i, mask in enumerate(inputs["attention_mask"]):
            ids = inputs["input_ids"][i][mask.bool()][None]
            alone.append(run(model, decoder, ids[0].tolist(), settings, seed=100 + i, ends=(5,)))
        sequences = [
            Sequence(i, ids[mask.bool()].tolist(), int(mask.sum()) + 30, torch.Generator().manual_seed(100 + i))
            for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
        ]
        together = run_batch(model, decoder, sequences, settings, ends=(5,))
        assert [s.new_tokens for s in together] == [s.new_tokens for s in alone]
        assert [(s.forwards, s.revisions, s.decided_at) for s in together] == [
            (s.forwards, s.revisions, s.decided_at) for s in alone
        ]


def run_batch(model, decoder, sequences, settings=(), ends=(), cache=None):
    settings = dict(settings)
    warpers = [TemperatureLogitsWarper(settings["temperature"])] if settings else []
    distribution = LogitsPipeline(LogitsProcessorList(warpers), bool(settings), None, len(sequences))
    batch = Batch(sequences, distribution, Stopping(frozenset(ends)), config=model.config)
    engine = Engine(model)
    decode(engine, decoder, batch, cache or engine.new_cache(len(sequences)))
    return sequences


def run(model, decoder, prompt, settings=(), seed=0, ends=(), count=30, cache=None):
    sequence = Sequence(0, prompt, len(prompt) + count, torch.Generator().manual_seed(seed))
    return run_batch(model, decoder, [sequence], settings, ends, cache)[0]


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("schedule", ["two_slot", "plain"])
@pytest.mark.parametrize("k", [0, 0.5, 1, 1.5])
def test_cache_after_a_run_is_a_fresh_prefill(resample_model, cache_error, k, schedule, window):
    model = resample_model(window=window)
    decoder = ResampleDecoder(window=window, iterations=k, schedule=schedule)
    for settings in ((), {"temperature": 1.0}):
        cache = Engine(model).new_cache(1)
        sequence = run(model, decoder, list(range(5, 20)), settings, cache=cache)
        assert sequence.cached >= len(sequence.tokens) - window
        assert cache_error(model, cache, 0, sequence.tokens[: sequence.cached]) < 1e-4


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("redraw", ["always", "if_changed"])
@pytest.mark.parametrize("k", [0.5, 1, 1.5])
def test_schedules_differ_in_forwards_only(resample_model, k, redraw, window):
    model = resample_model(window=window)
    for accept in ("gibbs", "argmax_threshold"):
        decoder = ResampleDecoder(window, k, accept, threshold=0.3, redraw=redraw)
        two_slot, plain = (
            run(model, dataclasses.replace(decoder, schedule=schedule), [7, 8, 9], {"temperature": 1.0}, 5, count=20)
            for schedule in ("two_slot", "plain")
        )
        assert two_slot.new_tokens == plain.new_tokens and two_slot.revisions == plain.revisions
        assert any(two_slot.revisions) and two_slot.forwards <= plain.forwards
        if k == 0.5:  # each token that is kept saves one forward, except in the last window, which nothing follows
            assert plain.forwards - two_slot.forwards == two_slot.revisions[:-window].count(0)


def test_a_kept_cache_is_used_by_the_next_turn(resample_model):
    model, decoder = resample_model(), ResampleDecoder(iterations=1)
    cache = SlotCache(model.config.num_hidden_layers)
    first = model.generate(
        torch.tensor([[7, 8, 9]]), max_new_tokens=12, custom_generate=decoder, past_key_values=cache, do_sample=False
    )
    longer = torch.cat([first, torch.tensor([[4, 5]])], dim=1)
    settings = {"max_new_tokens": 12, "custom_generate": decoder, "do_sample": False}
    assert cache.lengths[0] >= first.shape[1] - 1
    assert torch.equal(model.generate(longer, past_key_values=cache, **settings), model.generate(longer, **settings))


def test_eos_counts_when_it_is_committed(resample_model):
    """The text with an EOS is the text without one, cut at the first committed EOS; nothing is drawn behind a drawn EOS."""
    model = resample_model()
    for k in (0.5, 1, 1.5):
        free = run(model, ResampleDecoder(iterations=k), [7, 8, 9], {"temperature": 1.5}, seed=2, count=40)
        common = max(set(free.new_tokens), key=free.new_tokens.count)
        stopped = run(
            model, ResampleDecoder(iterations=k), [7, 8, 9], {"temperature": 1.5}, seed=2, ends=(common,), count=40
        )
        assert stopped.finished and common not in stopped.new_tokens[:-1]
        assert stopped.new_tokens[-1] == common
        assert len(stopped.new_tokens) == len(stopped.revisions) == len(stopped.decided_at)


@pytest.mark.parametrize("schedule", ["two_slot", "plain"])
@pytest.mark.parametrize("k", [0.5, 1, 1.5, 2])
def test_the_window_stops_at_an_end_that_was_resampled(k, schedule):
    """Tables where the first token becomes an end, and what would be drawn behind that would take it back."""

    def certain(*tokens):
        return torch.nn.functional.one_hot(torch.tensor(tokens), 4).double().clamp_min(1e-9).numpy()

    end = 3
    engine = TableEngine(certain(0)[0], certain(1, 1, 1, 2), certain(0, end, 0, 0))
    sequence = Sequence(0, [0], 9, torch.Generator())
    batch = Batch([sequence], LogitsPipeline(LogitsProcessorList(), False), Stopping(frozenset({end})))
    decode(engine, ResampleDecoder(iterations=k, schedule=schedule), batch, SlotCache(0, 1))
    assert sequence.new_tokens == [end] and sequence.revisions == [1]
    assert sequence.forwards == 3 == engine.forwards  # two tokens drawn, the first resampled; nothing behind the end


def test_nothing_stands_behind_an_eos_that_was_drawn_anew(resample_model, recording_streamer):
    """Only the oldest token, which a previous-token distribution may have made an EOS, has others behind it."""
    model, ends = resample_model(window=3), list(range(10, 30))
    for seed in range(6):
        torch.manual_seed(seed)
        model.generate(
            torch.tensor([[7, 8, 9]]), max_new_tokens=20, custom_generate=ResampleDecoder(3, 1.5), eos_token_id=ends,
            streamer=recording_streamer, **SAMPLED,
        )  # fmt: skip
    drafts = recording_streamer.texts("draft")
    assert any(set(draft[1:]) & set(ends) for draft in drafts)
    assert not any(set(draft[1:-1]) & set(ends) for draft in drafts)


def test_stop_strings_cut_exactly(resample_model, tokenizer):
    model = resample_model()
    ids = torch.tensor([list(range(30, 40))])
    settings = {"custom_generate": ResampleDecoder(iterations=1), "do_sample": False, "max_new_tokens": 30}
    whole = tokenizer.decode(model.generate(ids, **settings)[0, 10:])
    stop = whole[9:11]
    cut = tokenizer.decode(model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **settings)[0, 10:])
    assert whole.startswith(cut) and stop in cut and stop not in cut[:-1]


@pytest.mark.parametrize("window", [2, 3])
def test_streaming_never_takes_back(resample_model, recording_streamer, window):
    model = resample_model(window=window)
    ids = torch.tensor([[7, 8, 9]])
    decoder = ResampleDecoder(window=window, iterations=1)
    output = model.generate(
        ids, max_new_tokens=25, custom_generate=decoder, streamer=recording_streamer, **SAMPLED, **DICT
    )
    pieces = recording_streamer.texts("put")
    assert sum(pieces[1:], []) == output.sequences[0, 3:].tolist()
    assert sum(output.revisions[0]) > 3 and all(len(piece) <= window for piece in pieces[1:])
    drafts = recording_streamer.texts("draft")
    assert drafts and max(map(len, drafts)) <= window


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("window", [2, 3])
def test_the_limit_is_exact(resample_model, window, count):
    """Nothing is drawn beyond it, so the last tokens have no successors to be judged by."""
    model, decoder = resample_model(window=window), ResampleDecoder(window=window, iterations=1)
    output = model.generate(torch.tensor([[7, 8]]), max_new_tokens=count, custom_generate=decoder, **DICT)
    assert output.sequences.shape[1] == 2 + count
    assert not any(output.revisions[0][1 - window :]) and (count < 10 or any(output.revisions[0]))


def test_logprobs_are_those_of_the_distribution_drawn_from(resample_model):
    """Greedy, k = 0.5: of the previous-token distribution for every token but the last."""
    model, config = resample_model(), ResampleConfig()
    output = model.generate(
        torch.tensor([[7, 8, 9]]), max_new_tokens=8, custom_generate=ResampleDecoder(), do_sample=False,
        output_logprobs=True, **DICT,
    )  # fmt: skip
    text = output.sequences[0].tolist()
    # Only a token whose successor is not revised later stands beside the very token that it was judged by.
    for i in range(3, 9):
        if not output.revisions[0][i + 1 - 3]:
            distribution = uncached_previous(model, config, text, i, 2).log_softmax(-1)
            assert abs(distribution[text[i]] - output.logprobs[0, i - 3]) < 1e-4
    last = model(torch.tensor([text]), use_cache=False).logits[0, -2].log_softmax(-1)
    if not output.revisions[0][-2]:
        assert abs(last[text[-1]] - output.logprobs[0, -1]) < 1e-4


def test_accept_rules():
    raw = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 0.0]])
    distribution = LogitsPipeline(LogitsProcessorList([TemperatureLogitsWarper(0.5)]), True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    # softmax([2, 1, 0]) has a maximum of 0.665 at temperature 1 and of 0.867 at temperature 0.5.
    for threshold, expected in ((0.6, [0, 1]), (0.7, [2, 1]), (0.99, [2, 2])):
        rule = AcceptRule("argmax_threshold", threshold)
        assert rule(distribution, raw.clone(), [2, 2], None, generators).tolist() == expected
    assert AcceptRule(temperature=0)(distribution, raw.clone(), [2, 2], None, generators).tolist() == [0, 1]
    count = 4000
    many = [torch.Generator().manual_seed(i) for i in range(count)]
    for temperature, expected in ((None, 0.867), (1.0, 0.665), (2.0, 0.506)):
        tokens = AcceptRule(temperature=temperature)(distribution, raw[:1].repeat(count, 1), [2] * count, None, many)
        assert abs((tokens == 0).float().mean() - expected) < 4 * (0.25 / count) ** 0.5


def test_decoder_is_a_value_with_a_spec():
    decoder = decoder_from_spec("rpt:window=3,iterations=1.5,accept=argmax_threshold,threshold=0.8,schedule=plain")
    assert decoder == ResampleDecoder(3, 1.5, "argmax_threshold", 0.8, schedule="plain")
    assert eval(repr(decoder)) == decoder and hash(decoder) == hash(dataclasses.replace(decoder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 1}, "window must be a whole number of at least 2, got 1"),
        ({"iterations": 0.7}, "iterations must be a multiple of 0.5 from 0 to 64, got 0.7"),
        ({"iterations": -1}, "iterations"),
        ({"accept": "metropolis"}, "accept must be one of 'gibbs', 'argmax_threshold'"),
        ({"threshold": -1}, "threshold"),
        ({"temperature_ptp": -0.1}, "temperature_ptp"),
        ({"redraw": "never"}, "redraw"),
        ({"schedule": "fast"}, "schedule"),
        ({"refresh_prev": "yes"}, "refresh_prev"),
    ],
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ResampleDecoder(**values)


@pytest.mark.parametrize(
    ("family", "config", "settings", "message"),
    [
        ("llama", {}, {"window": 3}, "window must be one of 2 for this model.*got 3"),
        ("llama", {"window": 3, "perm": "rotate"}, {"window": 2}, "window must be one of 3 for this model"),
        ("llama", {"prev_target": "ntp"}, {"refresh_prev": True}, "refresh_prev must be None or False"),
        ("mistral-window", {"rope_index": "token"}, {}, "sliding window"),
    ],
)
def test_a_model_trained_otherwise_is_refused(resample_model, family, config, settings, message):
    with pytest.raises(ValueError, match=message):
        resample_model(family, **config).generate(
            torch.tensor([[5, 6]]), max_new_tokens=3, custom_generate=ResampleDecoder(**settings)
        )


def test_an_untrained_model_is_refused(fresh_model):
    model, ids = fresh_model("llama"), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="not trained to predict previous tokens"):
        model.generate(ids, max_new_tokens=3, custom_generate=ResampleDecoder())
    model.config.resample = ResampleConfig().as_dict()
    with pytest.raises(ValueError, match="no offset code.*load_offset_code"):
        model.generate(ids, max_new_tokens=3, custom_generate=ResampleDecoder())


def test_the_mask_token_is_text_like_any_other(resample_model):
    """No mask token is needed, and none is ruled out."""
    model = resample_model()
    model.generation_config.mask_token_id = None
    out = model.generate(torch.tensor([[5, MASK]]), max_new_tokens=3, custom_generate=ResampleDecoder())
    assert out.shape[1] == 5
