"""FlowDecoder on tiny models: cached = uncached, batched = one by one, the samplers' own loop, and its limits."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from transformers import GenerationConfig

from decoding.engine import Engine
from decoding.rules import ConfidenceThreshold, EntropyBound, TopK
from decoding.sampling import LogitsPipeline
from dfm import FlowDecoder, Query, Sampler, open_texts
from dfm.draws import Draws, LikeliestDraws
from dfm.flow_config import FlowTraits
from dfm.paths.mixture import MixturePath
from dfm.rates.velocities import ForwardVelocity
from dfm.samplers import SAMPLERS
from dfm.samplers.rates import GuidedEuler
from dfm.sampling.loop import Posterior, run_step
from dfm.sampling.state import FlowState
from sbd import SetBlockDecoder
from tests.conftest import MASK, VOCAB, RecordingStreamer
from tests.dfm.networks import BlockCausal, uniform_model
from tests.dfm.runs import first_seed, flow, generate

DOUBLE = torch.float64
MASK_SAMPLERS = [name for name, kind in SAMPLERS.items() if "mask" in kind.sources and not kind.tells_target]
UNIFORM_SAMPLERS = [name for name, kind in SAMPLERS.items() if "uniform" in kind.sources]


def uncached(model, decoder: FlowDecoder, text: list[int], count: int, seed: int, do_sample: bool):
    """Blocks one after the other by the samplers' own loop on a network without cache: (tokens, forwards)."""
    text, wanted, evaluations = list(text), len(text) + count, 0
    generator, traits = torch.Generator().manual_seed(seed), FlowTraits.of(model.config)
    source = traits.make_source(model.config.vocab_size, MASK)
    run = decoder.run(model.config, MASK)
    path, sampler = run.path, run.make_sampler(decoder.block_size)
    while len(text) < wanted:
        greedy = not do_sample and sampler.ranks_positions
        network = BlockCausal(model, text, traits, path.scheduler)
        posterior = Posterior(network, source, temperature=1.0 if do_sample or greedy else 0.0)
        x = torch.zeros(1, decoder.block_size, dtype=torch.long)
        draws = (LikeliestDraws if greedy else Draws)([generator])
        state = FlowState.start(x, torch.zeros_like(x, dtype=torch.bool), source, draws)
        while not state.done.all() and not (run.keeps and not state.masked.any()):
            run_step(sampler.step(state, draws), lambda query: posterior.answer(query, state))  # noqa: B023
        text += state.x[0].tolist()
        evaluations += int(state.evaluations)
    return text[:wanted], evaluations


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


@dataclass(frozen=True)
class Uneven(Sampler):
    """Reveals about half of the masks; texts that have some left then look again, and draw one token anew.

    everywhere: the second look asks about all positions; those that are decided keep their token then.
    """

    path: MixturePath
    everywhere: bool = False

    on_grid = False

    def step(self, state, draws):
        left = state.masked & state.free
        p1 = yield Query(state.x, state.t, state.masked, only=left)
        shown = left & ((draws.uniform(left) < 0.5) | draws.pick(left))
        state.write(draws.rows(p1[shown[left]], shown), shown)
        state.done = state.done | ~(state.masked & state.free).any(-1)
        if not state.done.all():
            site = draws.pick(state.free)
            where = torch.ones_like(site) if self.everywhere else site
            p1 = yield Query(state.x, state.t, state.masked, carry_over=self.everywhere, only=where)
            state.write(draws.rows(p1[site[where]], site), site)


class UnevenEverywhere(Uneven):
    @classmethod
    def default(cls, path, grid):
        return cls(path, everywhere=True)


@pytest.mark.parametrize("block_size", [5, None])
@pytest.mark.parametrize(
    "name", ["exact", "topk", "remdm", "first_hitting", "theta_trapezoidal", "p2", "psi", Uneven, UnevenEverywhere]
)
def test_batched_equals_one_by_one(monkeypatch, shared_model, prompts, new_tokens, name, block_size):
    """Ragged prompts, sequences that end at different times and steps of different length, in groups of any size."""
    model, inputs = shared_model("llama", DOUBLE), prompts(4, 11, 7)
    model.generation_config.eos_token_id = None
    decoder = (
        flow(name, 4, block_size=block_size)
        if isinstance(name, str)
        else FlowDecoder(sampler=name, block_size=block_size)
    )
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
    monkeypatch.setattr(open_texts, "ROWS_AT_ONCE", 2 * (block_size or 10))
    in_two_groups = generate(model, inputs, decoder, 10, True)
    assert torch.equal(in_two_groups.sequences, together.sequences) and in_two_groups.trace == together.trace


@pytest.mark.parametrize("name", ["exact", "topk", "corrector", "p2"])
def test_a_batch_runs_the_head_once_a_forward_and_is_set_up_once(monkeypatch, shared_model, prompts, name):
    calls = Counter()

    def count(owner, method):
        original = getattr(owner, method)

        def counting(*arguments):
            calls[method] += 1
            return original(*arguments)

        monkeypatch.setattr(owner, method, counting)

    count(Engine, "head")
    count(Engine, "step")
    count(FlowDecoder, "run")
    output = generate(shared_model("llama"), prompts(4, 9, 6), flow(name, 3, block_size=4), 12, True)
    assert output.forwards.max().item() == calls["step"] >= calls["head"] > 0.7 * calls["step"]
    assert calls["run"] == 1


def test_guidance_is_refused_where_there_is_no_second_model(shared_model, prompts):
    def guided(path, grid):
        return GuidedEuler(path, grid, ForwardVelocity(path))

    with pytest.raises(ValueError, match="sampler must be one without guidance"):
        generate(shared_model("llama"), prompts(5), FlowDecoder(sampler=guided, steps=2), 4, True)


def decode_with_seed(model, decoder, ids, config, seed):
    """One sequence through the engine with a generator of this seed."""
    from transformers import LogitsProcessorList

    from decoding import Engine
    from decoding.batch import Batch, Stopping
    from decoding.decoder import decode
    from decoding.request import make_sequences

    sequences = make_sequences(model, ids, None, config.max_length)
    sequences[0].generator.manual_seed(seed)
    distribution = LogitsPipeline(LogitsProcessorList(), True, MASK, 1)
    batch = Batch(sequences, distribution, Stopping(), MASK, config=model.config)
    engine = Engine(model)
    decode(engine, decoder, batch, engine.new_cache(1))
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
