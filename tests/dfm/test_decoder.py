"""FlowDecoder on tiny models: cached = uncached, batched = one by one, the samplers' own loop, and its limits."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from decoding import decoder_from_spec
from decoding.rules import ConfidenceThreshold, EntropyBound, TopK
from decoding.sampling import TokenLaw
from dfm import (
    Draws,
    ExactX1,
    FlowDecoder,
    FlowState,
    MixturePath,
    PiecewiseLinearScheduler,
    Posterior,
    run_step,
    time_grid,
)
from dfm.draws import LikeliestDraws
from dfm.fit import FittedSchedule
from dfm.named_samplers import SAMPLERS, named_scheduler, ranks_positions
from dfm.traits import FlowTraits
from sbd import SetBlockDecoder
from tests.conftest import MASK, VOCAB, RecordingStreamer
from tests.dfm.networks import BlockCausal, uniform_model

DOUBLE = torch.float64
MASK_SAMPLERS = [name for name, named in SAMPLERS.items() if "mask" in named.sources]
UNIFORM_SAMPLERS = [name for name, named in SAMPLERS.items() if "uniform" in named.sources]


def flow(sampler: str, steps: int | None = 5, **settings) -> FlowDecoder:
    return FlowDecoder(sampler=sampler, steps=steps if SAMPLERS[sampler].on_grid else None, **settings)


def uncached(model, decoder: FlowDecoder, text: list[int], count: int, seed: int, do_sample: bool):
    """Blocks one after the other by the samplers' own loop on a network without cache: (tokens, forwards)."""
    text, wanted, evaluations = list(text), len(text) + count, 0
    generator, traits = torch.Generator().manual_seed(seed), FlowTraits.of(model.config)
    source = traits.make_source(model.config.vocab_size, MASK)
    path, sampler = decoder._make(source, decoder.block_size)
    while len(text) < wanted:
        greedy = not do_sample and ranks_positions(sampler)
        network = BlockCausal(model, text, traits, path.scheduler)
        posterior = Posterior(network, source, temperature=1.0 if do_sample or greedy else 0.0)
        x = torch.zeros(1, decoder.block_size, dtype=torch.long)
        draws = (LikeliestDraws if greedy else Draws)([generator])
        state = FlowState.start(x, torch.zeros_like(x, dtype=torch.bool), source, draws)
        while not state.done.all() and not (decoder._keeps and not state.masked.any()):
            run_step(sampler.step(state, draws), lambda query: posterior.answer(query, state))  # noqa: B023
        text += state.x[0].tolist()
        evaluations += int(state.evaluations)
    return text[:wanted], evaluations


def generate(model, inputs, decoder, count: int, do_sample: bool, seed: int = 3):
    torch.manual_seed(seed)
    arguments = {"do_sample": True, "top_k": 0} if do_sample else {"do_sample": False}
    return model.generate(
        **inputs, max_new_tokens=count, custom_generate=decoder, return_dict_in_generate=True, **arguments
    )


def first_seed(seed: int = 3) -> int:
    """The seed that ``generate`` gives to the first sequence after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return int(torch.randint(2**62, ()))


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("name", MASK_SAMPLERS)
def test_cached_blocks_equal_uncached_ones(shared_model, prompts, name, do_sample):
    model, inputs = shared_model("llama", DOUBLE), prompts(7)
    decoder = flow(name, block_size=6)
    output = generate(model, inputs, decoder, 12, do_sample)
    text, evaluations = uncached(model, decoder, inputs["input_ids"][0].tolist(), 12, first_seed(), do_sample)
    assert output.sequences[0].tolist() == text
    assert output.forwards.item() == evaluations


@pytest.mark.parametrize("name", UNIFORM_SAMPLERS)
def test_cached_blocks_of_a_uniform_source_equal_uncached_ones(prompts, name):
    model, inputs = uniform_model(), prompts(7)
    decoder = flow(name, block_size=4, path="uniform")
    output = generate(model, inputs, decoder, 8, True)
    text, evaluations = uncached(model, decoder, inputs["input_ids"][0].tolist(), 8, first_seed(), True)
    assert output.sequences[0].tolist() == text
    assert output.forwards.item() == evaluations


@pytest.mark.parametrize("family", ["qwen2-window", "qwen3", "llama-3.1"])
def test_cached_equals_uncached_in_other_families(shared_model, prompts, family):
    model, inputs = shared_model(family, DOUBLE), prompts(11)
    decoder = flow("remdm", block_size=5)
    text, _ = uncached(model, decoder, inputs["input_ids"][0].tolist(), 10, first_seed(), True)
    assert generate(model, inputs, decoder, 10, True).sequences[0].tolist() == text


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("path", ["mask", "uniform"])
def test_a_shifted_model_predicts_from_the_row_before(fresh_model, prompts, path, shift):
    model, inputs = fresh_model("llama", DOUBLE) if path == "mask" else uniform_model(), prompts(7)
    traits = dataclasses.replace(FlowTraits.of(model.config), shift=shift, source=path, block_sizes=(4,))
    model.config.flow = traits.as_dict()
    decoder = flow("exact", block_size=4, path=path)
    text, _ = uncached(model, decoder, inputs["input_ids"][0].tolist(), 12, first_seed(), True)
    output = generate(model, inputs, decoder, 12, True)
    assert output.sequences[0].tolist() == text


@pytest.mark.parametrize("block_size", [5, None])
@pytest.mark.parametrize("name", ["exact", "topk", "remdm", "first_hitting", "theta_trapezoidal"])
def test_batched_equals_one_by_one(shared_model, prompts, new_tokens, name, block_size):
    """Ragged prompts, and sequences that end at different times."""
    model, inputs = shared_model("llama", DOUBLE), prompts(4, 11, 7)
    model.generation_config.eos_token_id = None
    decoder = flow(name, 4, block_size=block_size)
    limit = 11 + 10
    together = generate(model, inputs, decoder, 10, True)
    seed = first_seed()
    for i, length in enumerate((4, 11, 7)):
        ids = inputs["input_ids"][i : i + 1, 11 - length :]
        config = GenerationConfig(max_length=limit - (11 - length), do_sample=True, pad_token_id=0)
        config.mask_token_id = MASK
        alone = decode_with_seed(model, decoder, ids, config, seed + i)
        assert new_tokens(together, i, 11) == alone.new_tokens
        assert together.forwards[i] == alone.forwards
        assert together.trace[i] == alone.decided_at


def decode_with_seed(model, decoder, ids, config, seed):
    """One sequence through the engine with a generator of this seed."""
    from transformers import LogitsProcessorList

    from decoding.batch import Batch
    from decoding.generate import make_sequences
    from decoding.loop import decode
    from decoding.model import EngineModel
    from decoding.stopping import Stopping
    from decoding.streaming import StreamWriter

    sequences = make_sequences(model, ids, None, config.max_length)
    sequences[0].generator.manual_seed(seed)
    law = TokenLaw(LogitsProcessorList(), True, MASK, 1)
    batch = Batch(sequences, law, Stopping(), MASK, config=model.config)
    decode(EngineModel(model, 1), decoder, batch, StreamWriter(None, 1))
    return sequences[0]


@pytest.mark.parametrize("rule", [EntropyBound(2.0), TopK(2), ConfidenceThreshold(0.3)])
def test_with_a_rule_it_is_set_block_decoding(shared_model, prompts, rule):
    model, inputs = shared_model("llama"), prompts(4, 9)
    flow_decoder = FlowDecoder(block_size=6, sampler="rule", rule=rule)
    ours = generate(model, inputs, flow_decoder, 15, False)
    theirs = generate(model, inputs, SetBlockDecoder(6, rule), 15, False)
    assert ours.forwards.tolist() == theirs.forwards.tolist()
    assert torch.equal(ours.sequences, theirs.sequences) and ours.trace == theirs.trace


@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize(("name", "each"), [("exact", 1), ("corrector", 1), ("theta_trapezoidal", 2), ("topk", 1)])
def test_one_forward_for_each_step(shared_model, prompts, count_rows, name, each, block_size):
    model = shared_model("llama")
    output = generate(model, prompts(5), flow(name, 3, block_size=block_size), 8, True)
    blocks = 2 if block_size else 1
    assert output.forwards.tolist() == [3 * each * blocks] and len(count_rows) == 3 * each * blocks
    if block_size:  # the second block brings the first one along as text
        assert count_rows == [5 + 4] + [4] * (3 * each - 1) + [4 + 4] + [4] * (3 * each - 1)
    else:
        assert count_rows == [13] * 3 * each


def test_by_default_as_many_steps_as_tokens(shared_model, prompts):
    model = shared_model("llama")
    assert generate(model, prompts(5), FlowDecoder(sampler="topk"), 9, False).forwards.tolist() == [9]
    assert generate(model, prompts(5), FlowDecoder(sampler="topk", block_size=3), 9, False).forwards.tolist() == [9]


def test_decoding_the_whole_text_is_infilling_behind_the_prompt(shared_model, prompts):
    model, inputs = shared_model("qwen3", DOUBLE), prompts(6)
    for name in ("exact", "remdm", "p2"):
        decoder = flow(name, 4)
        output = generate(model, inputs, decoder, 8, True)
        canvas = torch.cat([inputs["input_ids"], torch.full((1, 8), 50)], dim=1)
        filled = decoder.infill(model, canvas, torch.arange(14)[None] < 6, seed=first_seed())
        assert torch.equal(output.sequences, filled.tokens)
        assert output.forwards.tolist() == filled.evaluations.tolist() == [4]


@pytest.mark.parametrize("path", ["mask", "uniform"])
def test_infilling_keeps_what_is_fixed_and_batches_like_single_runs(shared_model, path):
    model = shared_model("llama", DOUBLE) if path == "mask" else uniform_model(block_sizes=None)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, MASK, (3, 12), generator=generator)
    fixed = torch.rand(3, 12, generator=generator) < 0.4
    real = torch.ones(3, 12, dtype=torch.long)
    real[1, :4], real[2, 9:] = 0, 0
    decoder = flow("exact", 4, path=path)
    out = decoder.infill(model, ids, fixed, attention_mask=real, seed=7)
    kept = fixed | ~real.bool()
    assert torch.equal(out.tokens[kept], ids[kept])
    assert (out.tokens[~kept] != MASK).all() and (out.tokens[~kept] != ids[~kept]).float().mean() > 0.5
    for i, span in enumerate((slice(0, 12), slice(4, 12), slice(0, 9))):
        alone = decoder.infill(model, ids[i : i + 1, span], fixed[i : i + 1, span], seed=7 + i)
        assert torch.equal(alone.tokens[0], out.tokens[i, span])
        assert alone.evaluations.item() == out.evaluations[i].item() == 4


def test_infilling_sees_both_sides(shared_model):
    model = shared_model("llama", DOUBLE)
    ids = torch.arange(3, 11)[None]
    fixed = torch.ones(1, 8, dtype=torch.bool)
    fixed[0, 3] = False
    laws = []
    for last in (20, 21):
        ids[0, 7] = last
        laws.append([int(FlowDecoder(steps=1).infill(model, ids, fixed, seed=s).tokens[0, 3]) for s in range(60)])
    assert laws[0] != laws[1]
    assert (
        FlowDecoder(steps=1).infill(model, ids, fixed, temperature=0.0, seed=1).tokens[0, 3]
        == FlowDecoder(steps=1, sampler="topk").infill(model, ids, fixed, temperature=0.0, seed=2).tokens[0, 3]
    )


def test_a_long_prompt_is_not_run_causally_for_a_whole_text(shared_model, prompts, count_rows):
    model = shared_model("llama", torch.float32, max_position_embeddings=700)
    output = generate(model, prompts(600), flow("exact", 2), 4, False)
    assert output.prefill_forwards == 0 and count_rows == [604, 604]
    assert generate(model, prompts(600), flow("exact", 2, block_size=4), 4, False).prefill_forwards == 1


@pytest.mark.parametrize("name", ["exact", "topk", "first_hitting"])
def test_what_stays_is_streamed_and_ends_at_the_first_stop(shared_model, prompts, name):
    model, inputs = shared_model("llama"), prompts(5)
    free = generate(model, inputs, flow(name, 12, block_size=12), 12, False)
    text = free.sequences[0, 5:].tolist()
    stop = text[3]
    streamer = RecordingStreamer()
    torch.manual_seed(3)
    cut = model.generate(
        **inputs,
        max_new_tokens=12,
        custom_generate=flow(name, 12, block_size=12),
        eos_token_id=stop,
        streamer=streamer,
        do_sample=False,
        return_dict_in_generate=True,
    )
    end = text.index(stop) + 1
    assert cut.sequences[0, 5:].tolist() == text[:end]
    assert cut.trace[0] == free.trace[0][:end] and cut.forwards.item() == max(cut.trace[0])
    assert sum(streamer.texts("put"), [])[-end:] == text[:end]


def test_what_may_be_masked_again_is_committed_at_the_end_of_its_block(shared_model, prompts):
    model, streamer = shared_model("llama"), RecordingStreamer()
    decoder = FlowDecoder(sampler="remdm", steps=6, block_size=5)
    model.generate(
        **prompts(5), max_new_tokens=10, custom_generate=decoder, do_sample=True, streamer=streamer, pad_token_id=0
    )
    assert [len(ids) for ids in streamer.texts("put")[1:]] == [5, 5]
    assert any(MASK in ids for ids in streamer.texts("draft"))


def test_the_cache_after_the_run_is_a_fresh_prefill(shared_model, prompts, cache_error):
    from decoding import SlotCache

    model, inputs = shared_model("llama", DOUBLE), prompts(6)
    for decoder in (flow("exact", 3, block_size=4), flow("exact", 3)):
        cache = SlotCache(model.config.num_hidden_layers)
        output = model.generate(**inputs, max_new_tokens=8, custom_generate=decoder, past_key_values=cache)
        tokens = output[0].tolist()
        assert cache.tokens[0] == tokens[:-1]
        assert cache_error(model, cache, 0, tokens[:-1]) < 1e-10


def test_the_posterior_is_the_processed_one(shared_model, prompts):
    model = shared_model("llama")
    decoder, arguments = flow("exact", 3, block_size=6), {"do_sample": True, "max_new_tokens": 12}
    one = model.generate(**prompts(5), custom_generate=decoder, top_k=1, **arguments)
    assert one.shape[1] == 17
    allowed = [40, 41, 42]
    few = model.generate(
        **prompts(5),
        custom_generate=decoder,
        suppress_tokens=[i for i in range(VOCAB) if i not in allowed],
        **arguments,
    )
    assert set(few[0, 5:].tolist()) <= set(allowed)
    with pytest.raises(ValueError, match="cannot honour NoRepeatNGramLogitsProcessor inside a block"):
        model.generate(**prompts(5), custom_generate=decoder, no_repeat_ngram_size=2, **arguments)


def test_a_scheduler_of_ones_own(shared_model, prompts):
    """A fitted schedule's quotas are what is revealed in each forward."""
    scheduler = PiecewiseLinearScheduler((0.0, 0.1, 0.5, 1.0))
    decoder = FlowDecoder(scheduler=scheduler, sampler="topk", steps=3, block_size=10)
    output = generate(shared_model("llama"), prompts(5), decoder, 10, False)
    assert [output.trace[0].count(i) for i in (1, 2, 3)] == [1, 4, 5]


def test_a_fitted_schedule_from_a_file(shared_model, prompts, tmp_path):
    """As many steps as it has rounds, and its quotas are scaled to the block."""
    file = tmp_path / "schedule.json"
    FittedSchedule((0, 1, 4, 10)).save(file)
    decoder = decoder_from_spec(f"dfm:scheduler={file},sampler=topk,block_size=20")
    assert decoder == FlowDecoder(scheduler=FittedSchedule((0, 1, 4, 10)), sampler="topk", block_size=20)
    output = generate(shared_model("llama"), prompts(5), decoder, 20, False)
    assert [output.trace[0].count(i) for i in (1, 2, 3)] == [2, 6, 12]
    with pytest.raises(ValueError, match="nowhere.json' does not exist"):
        decoder_from_spec("dfm:scheduler=nowhere.json")


def test_a_sampler_of_ones_own(shared_model, prompts):
    def late(path: MixturePath, grid):
        return ExactX1(path, (0.0, 0.9, 1.0))

    output = generate(shared_model("llama"), prompts(5), FlowDecoder(sampler=late, block_size=8), 8, True)
    assert output.forwards.item() == 2


@pytest.mark.parametrize(
    ("spec", "decoder"),
    [
        ("dfm", FlowDecoder()),
        ("dfm:block_size=16,steps=8,sampler=euler", FlowDecoder(sampler="euler", steps=8, block_size=16)),
        (
            "dfm:block_size=8,sampler=rule,entropy_bound=0.1",
            FlowDecoder(block_size=8, sampler="rule", rule=EntropyBound(0.1)),
        ),
        ("dfm:path=uniform,scheduler=kinetic", FlowDecoder(path="uniform", scheduler="kinetic")),
    ],
)
def test_specs(spec, decoder):
    assert decoder_from_spec(spec) == decoder and hash(decoder) == hash(decoder_from_spec(spec))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "metric"}, "path must be one of 'mask', 'uniform', got 'metric'"),
        ({"scheduler": "lineal"}, "scheduler must be one of 'linear',.*got 'lineal'"),
        ({"sampler": "eular"}, r"sampler \(for path 'mask'\) must be one of 'exact', 'euler',.*got 'eular'"),
        ({"sampler": "gibbs"}, r"sampler \(for path 'mask'\).*got 'gibbs'"),
        ({"sampler": 3}, "sampler must be a name or a function"),
        ({"sampler": "rule"}, "rule must be a rule such as EntropyBound.*got None"),
        ({"rule": TopK(1)}, "rule must be .* None for others"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"block_size": 0}, "block_size must be a whole number"),
        ({"sampler": "first_hitting", "steps": 4}, "steps must be None for sampler 'first_hitting'"),
        ({"sampler": "rule", "rule": TopK(1), "steps": 4}, "steps must be None for sampler 'rule'"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowDecoder(**settings)


def test_what_a_model_was_not_trained_for(shared_model, fresh_model, prompts):
    model, inputs = shared_model("llama"), prompts(5)
    with pytest.raises(ValueError, match="path must be 'mask' for this model.*got 'uniform'"):
        model.generate(**inputs, custom_generate=FlowDecoder(path="uniform"), max_new_tokens=4)
    with pytest.raises(ValueError, match="path must be 'uniform' for this model"):
        uniform_model().generate(**inputs, custom_generate=FlowDecoder(), max_new_tokens=4)
    with pytest.warns(UserWarning, match="block_size=4: this model was trained on whole texts"):
        decoder = FlowDecoder(path="uniform", steps=1, block_size=4)
        uniform_model(block_sizes=None).generate(**inputs, custom_generate=decoder, max_new_tokens=4)
    trained = fresh_model("llama")
    trained.generation_config.trained_block_sizes = [4, 5]
    with pytest.warns(UserWarning, match="block_size=None: this model was trained with blocks"):
        trained.generate(**inputs, custom_generate=FlowDecoder(steps=1), max_new_tokens=4)
    with pytest.warns(UserWarning, match="block_size=8: this model was trained with block sizes 4 to 5"):
        trained.generate(**inputs, custom_generate=FlowDecoder(steps=1, block_size=8), max_new_tokens=4)


def test_infilling_refuses_what_makes_no_sense(shared_model, fresh_model):
    model, ids = shared_model("llama"), torch.arange(3, 9)[None]
    fixed = torch.zeros(1, 6, dtype=torch.bool)
    for settings, arguments, message in (
        ({"block_size": 4}, (ids, fixed), "block_size must be None to infill"),
        ({}, (ids[0], fixed[0]), r"input_ids must be \[B, L\], got shape \(6,\)"),
        ({}, (ids, fixed.long()), "fixed must be bool"),
        ({}, (ids, fixed[:, :3]), r"fixed must be bool of shape \(1, 6\)"),
        ({}, (ids + VOCAB, ~fixed), "input_ids must be from 0 to 96 where they are fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowDecoder(steps=1, **settings).infill(model, *arguments)
    with pytest.raises(ValueError, match="attention_mask must be 1 on one run of tokens"):
        FlowDecoder(steps=1).infill(model, ids, fixed, attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]]))
    shifted = fresh_model("llama")
    shifted.config.flow = FlowTraits(shift=True).as_dict()
    with pytest.raises(ValueError, match="first position must be fixed"):
        FlowDecoder(steps=1).infill(shifted, ids, fixed)


def test_likeliest_draws_take_the_likeliest_and_still_pick_places():
    draws = LikeliestDraws([torch.Generator().manual_seed(0)])
    law = torch.tensor([[[0.4, 0.6], [0.9, 0.1]]])
    assert draws.categorical(law, torch.tensor([[True, True]])).tolist() == [[1, 0]]
    picks = {draws.pick(torch.ones(1, 4, dtype=torch.bool)).float().argmax().item() for _ in range(40)}
    assert picks == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["linear", "quadratic", "cubic", "cosine", "kinetic"])
def test_named_schedulers_rise_from_zero_to_one(name):
    for traits in (FlowTraits(), FlowTraits("uniform", excluded=(0,))):
        kappa = named_scheduler(name, traits.make_source(6, 5)).kappa(torch.linspace(0, 1, 9, dtype=DOUBLE))
        assert (kappa.diff() > 0).all() and abs(kappa[0]) < 1e-12 and abs(kappa[-1] - 1) < 1e-12


def test_time_grid_of_the_decoder_is_even(shared_model):
    _, sampler = FlowDecoder(steps=4, block_size=8)._make(FlowTraits().make_source(VOCAB, MASK), 8)
    assert sampler.grid == time_grid(4)
