"""Self-speculation is lossless: whatever is drafted, the text and its distribution are those of next-token decoding."""

import itertools

import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from decoding import Engine, NextTokenDecoder, SlotCache
from decoding.batch import Batch, Sequence, Stopping
from decoding.decoder import decode
from decoding.forward.gating import block_rows
from decoding.forward.rows import RowList
from decoding.sampling import LogitsPipeline
from sbd import SelfSpeculativeDecoder
from sbd.lossless.drafts import Draft, MaskDrafts
from tests.conftest import FAMILIES, MASK

LOOK_AHEADS = ("all", "alternate", 0, 1, 2, "auto")


def greedy(model, inputs, decoder=None, **settings):
    settings = {"max_new_tokens": 32, "do_sample": False, "suppress_tokens": [MASK], **settings}
    return model.generate(**inputs, custom_generate=decoder, **settings)


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
@pytest.mark.parametrize("draft", ["mask", "prompt_lookup", "both"])
def test_greedy_text_equals_generate(shared_model, prompts, look_ahead, draft):
    model = shared_model("llama")
    inputs = prompts(5, 12, 9)
    decoder = SelfSpeculativeDecoder(block_size=4, look_ahead=look_ahead, draft=draft)
    assert torch.equal(greedy(model, inputs, decoder), greedy(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_generate_for_every_family(shared_model, prompts, family):
    model = shared_model(family)
    inputs = prompts(5, 20)
    decoder = SelfSpeculativeDecoder(block_size=5)
    assert torch.equal(greedy(model, inputs, decoder), greedy(model, inputs))


def scripted(oracle) -> type[MaskDrafts]:
    """A source that proposes ``oracle(tokens, drafted)`` for the text ``tokens``, whatever the mask rows ``drafted``."""

    class ScriptedDrafts(MaskDrafts):
        def propose(self, tokens, count):
            drafts = oracle(tokens, self.draft.tokens)[:count]
            return Draft(drafts, [0.9] * len(drafts))

    return ScriptedDrafts


@pytest.mark.parametrize("look_ahead", ["all", "alternate", 0, 2])
@pytest.mark.parametrize("quality", ["right", "wrong", "random"])
def test_greedy_text_does_not_depend_on_the_drafts(shared_model, prompts, look_ahead, quality):
    model = shared_model("llama")
    inputs = prompts(8, 8)
    expected = greedy(model, inputs)
    random = torch.Generator().manual_seed(0)

    def oracle(tokens, drafted):
        (text,) = [row for row in expected.tolist() if row[: len(tokens)] == tokens]
        right = text[len(tokens) :]
        guess = torch.randint(3, MASK, (len(right),), generator=random).tolist()
        return {"right": right, "wrong": [(token + 1) % MASK for token in right], "random": guess}[quality]

    decoder = SelfSpeculativeDecoder(block_size=4, look_ahead=look_ahead, draft=scripted(oracle))
    output = greedy(model, inputs, decoder, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    if quality == "right":
        assert output.tokens_per_forward.min() > 3
        assert all(length == 3 for lengths in output.acceptance_lengths for length in lengths[:-1])
    if quality == "wrong":
        assert output.tokens_per_forward.tolist() == [1.0, 1.0]


def test_sampled_text_has_the_next_token_distribution(fresh_model):
    """12,000 samples of three tokens from a tiny model, against the exact distribution by enumeration."""
    vocabulary, prompt = 6, [1, 2, 3]
    model = fresh_model("llama", vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    texts = torch.tensor(list(itertools.product(range(vocabulary), repeat=3)))
    ids = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], dim=1)
    logits = model(input_ids=ids).logits[:, 2:5].double()
    logits[..., vocabulary - 1] = -torch.inf  # the mask token
    distribution = (logits / 0.8).softmax(-1).gather(-1, texts[..., None]).squeeze(-1).prod(-1)

    decoder = SelfSpeculativeDecoder(block_size=3, look_ahead="all")
    torch.manual_seed(0)
    runs = torch.cat(
        [
            model.generate(
                torch.tensor([prompt]),
                max_new_tokens=3,
                do_sample=True,
                temperature=0.8,
                top_k=0,
                num_return_sequences=1500,
                custom_generate=decoder,
            )[:, 3:]
            for _ in range(8)
        ]
    )
    index = (runs * torch.tensor([36, 6, 1])).sum(1)
    seen = torch.bincount(index, minlength=len(texts)).double()
    assert seen[distribution == 0].sum() == 0
    # Cells with few expected counts are merged, as the chi-square test asks.
    expected, rare = distribution * len(runs), distribution * len(runs) < 5
    observed = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    assert chisquare(observed[keep], expected[keep]).pvalue > 1e-4


def test_drafts_are_accepted_more_often_by_the_ratio_test(shared_model, prompts):
    """At temperature 1 the ratio test accepts sum min(p, q); testing point masses would accept sum p q only."""
    model = shared_model("llama")

    class PointMass(MaskDrafts):
        def propose(self, tokens, count):
            return Draft(self.draft.tokens, self.draft.confidences)

    rates = []
    for draft in ("mask", PointMass):
        torch.manual_seed(0)
        output = model.generate(
            **prompts(*[6] * 32),
            max_new_tokens=48,
            do_sample=True,
            temperature=4.0,
            top_k=0,
            custom_generate=SelfSpeculativeDecoder(block_size=4, look_ahead="all", draft=draft),
            return_dict_in_generate=True,
        )
        rates.append(float(output.new_tokens.sum() / output.forwards.sum()))
    assert rates[0] > 1.2 * rates[1]


def test_branch_logits_equal_a_separate_forward(shared_model):
    """Every look-ahead block sees the past, z and its own drafts, and is blind to the other blocks."""
    model = shared_model("llama", torch.float64)
    tokens, drafts, size = list(range(5, 17)), [20, 21, 22], 4
    engine = Engine(model)
    rows = RowList()
    rows.add_causal(tokens + drafts, 0)
    blocks = [
        rows.add_block([MASK] * size, len(tokens) + a, len(tokens) + len(drafts) + a * size)
        for a in range(len(drafts) + 1)
    ]
    together = engine.step([rows], engine.new_cache(1))
    for a, block in enumerate(blocks):
        alone = RowList()
        alone.add_causal(tokens + drafts[:a], 0)
        own = alone.add_block([MASK] * size, len(tokens) + a, len(tokens) + a)
        separate = engine.step([alone], engine.new_cache(1))
        torch.testing.assert_close(together.hidden([(0, block)]), separate.hidden([(0, own)]), atol=1e-10, rtol=0)


def test_row_counts(shared_model, prompts, count_rows):
    """A verifying forward has 1 + M + |S| k rows, a drafting one 1 + k."""
    model = shared_model("llama")
    for look_ahead, blocks in (("all", 4), ("alternate", 0), (0, 1), (2, 2)):
        count_rows.clear()
        greedy(model, prompts(2), SelfSpeculativeDecoder(block_size=4, look_ahead=look_ahead), max_new_tokens=24)
        assert count_rows[0] == 2 + 4  # the prompt's two tokens ride with the first block
        middle = set(count_rows[1:-8])
        assert middle == {1 + 3 + blocks * 4} | ({1 + 4} if blocks < 4 else set())


@pytest.mark.parametrize(("look_ahead", "covered"), [("all", 1.0), ("alternate", 0.0), (0, None)])
def test_tokens_per_forward_formula(shared_model, prompts, look_ahead, covered):
    """Simulated acceptance: TPF = (E[a] + 2 - h) / (2 - h), h the share of forwards whose draft goes on."""
    model = shared_model("llama", max_position_embeddings=4096)
    inputs = prompts(6)
    expected = greedy(model, inputs, max_new_tokens=600)
    coin = torch.Generator().manual_seed(0)

    def oracle(tokens, drafted):
        right = expected[0, len(tokens) :].tolist()
        simulated = [t if torch.rand((), generator=coin) < 0.7 else (t + 1) % MASK for t in right]
        return simulated if drafted else []  # nothing, where no block was provided for the length that came true

    decoder = SelfSpeculativeDecoder(block_size=4, look_ahead=look_ahead, draft=scripted(oracle))
    output = greedy(model, inputs, decoder, max_new_tokens=600, return_dict_in_generate=True)
    lengths = output.acceptance_lengths[0]
    mean = sum(lengths) / len(lengths)
    h = covered if covered is not None else lengths.count(3) / len(lengths)
    assert float(output.tokens_per_forward[0]) == pytest.approx((mean + 2 - h) / (2 - h), rel=0.02)


def test_batched_equals_single_for_ragged_ends(shared_model, fresh_model, prompts, new_tokens):
    model = fresh_model("llama")
    model.generation_config.eos_token_id = list(range(30, 45))
    inputs = prompts(4, 17, 9, 11)
    decoder = SelfSpeculativeDecoder(block_size=5)
    together = greedy(model, inputs, decoder, return_dict_in_generate=True)
    assert len(set(together.new_tokens.tolist())) > 1, "the sequences should end at different times"
    for i, mask in enumerate(inputs["attention_mask"]):
        alone = greedy(
            model, {"input_ids": inputs["input_ids"][i][mask.bool()][None]}, decoder, return_dict_in_generate=True
        )
        assert new_tokens(together, i, 17) == new_tokens(alone, 0, int(mask.sum()))
        assert together.forwards[i] == alone.forwards[0]


@pytest.mark.parametrize(
    "decoder",
    [
        SelfSpeculativeDecoder(block_size=4, look_ahead=look_ahead, draft=draft)
        for look_ahead in ("all", "alternate", 0, 1, 2)
        for draft in ("mask", "both")
    ],
    ids=repr,
)
def test_sampled_text_does_not_depend_on_the_batch(shared_model, prompts, decoder):
    """Nor does what is learned of drafts from the other rows: how many there are decides what is drawn."""
    model, inputs = shared_model("llama"), prompts(6, 11, 8)
    engine = Engine(model)

    def run(rows):
        sequences = []
        for i in rows:
            ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist()
            generator = torch.Generator().manual_seed(40 + i)
            sequences.append(Sequence(len(sequences), ids, len(ids) + 40, generator))
        warpers = LogitsProcessorList([TemperatureLogitsWarper(3.0)])
        pipeline = LogitsPipeline(warpers, True, MASK, len(sequences))
        decode(engine, decoder, Batch(sequences, pipeline, Stopping(), MASK), engine.new_cache(len(sequences)))
        return [(sequence.new_tokens, sequence.forwards) for sequence in sequences]

    alone = [run([i])[0] for i in range(3)]
    assert run(range(3)) == alone and run([2, 0]) == [alone[2], alone[0]]
    assert len({forwards for _, forwards in alone}) > 1


@pytest.mark.parametrize("look_ahead", ["all", "alternate", 0, 2])
def test_cache_after_a_run_is_a_fresh_prefill(shared_model, cache_error, look_ahead):
    model = shared_model("llama")
    sequence = Sequence(0, list(range(5, 20)), 50, torch.Generator())
    batch = Batch([sequence], LogitsPipeline(LogitsProcessorList(), False, MASK), Stopping(), MASK)
    engine = Engine(model)
    cache = engine.new_cache(1)
    decode(engine, SelfSpeculativeDecoder(block_size=4, look_ahead=look_ahead), batch, cache)
    assert sequence.cached >= 40
    assert cache_error(model, cache, 0, sequence.tokens[: sequence.cached]) < 1e-4


def test_cache_is_kept_between_turns(shared_model, prompts, count_rows):
    model = shared_model("llama")
    decoder, cache = SelfSpeculativeDecoder(block_size=4), SlotCache(model.config.num_hidden_layers)
    first = greedy(model, prompts(12), decoder, past_key_values=cache)
    longer = {"input_ids": torch.cat([first, torch.tensor([[7, 8, 9]])], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])  # the text may hold the pad id
    count_rows.clear()
    again = greedy(model, longer, decoder, past_key_values=cache)
    assert count_rows[0] <= 4 + 4
    assert torch.equal(again, greedy(model, longer))


def test_logprobs_are_those_of_a_plain_forward(shared_model, prompts):
    model = shared_model("llama")
    output = greedy(
        model, prompts(9), SelfSpeculativeDecoder(block_size=4), return_dict_in_generate=True, output_logprobs=True
    )
    log_p = model(input_ids=output.sequences).logits[0, 8:-1].log_softmax(-1)
    expected = log_p.gather(-1, output.sequences[0, 9:, None]).squeeze(-1)
    torch.testing.assert_close(output.logprobs[0], expected, atol=1e-4, rtol=0)


def test_a_grammar_holds_exactly(shared_model, prompts):
    """Allowed tokens depend on the last token and on the sequence, as verification sees them."""
    model = shared_model("llama")
    inputs = prompts(6, 10)

    def allowed(batch_id: int, ids: torch.Tensor) -> list[int]:
        return [3 + (int(ids[-1]) * 7 + step + batch_id) % 90 for step in range(12)]

    decoder = SelfSpeculativeDecoder(block_size=4)
    got = greedy(model, inputs, decoder, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(got, greedy(model, inputs, prefix_allowed_tokens_fn=allowed))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20, "eos_token_id": list(range(30, 60))},
        {"bad_words_ids": [[10], [11, 12]]},
        {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)])},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_processors_that_need_the_left_context_are_honoured(shared_model, prompts, settings):
    model = shared_model("llama")
    inputs = prompts(6, 10)
    decoder = SelfSpeculativeDecoder(block_size=4, draft="both")
    assert torch.equal(greedy(model, inputs, decoder, **settings), greedy(model, inputs, **settings))


def test_an_adapter_on_mask_rows_leaves_the_text_of_the_base_model(fresh_model, prompts):
    """A hand-made adapter, random and strong, that acts on block rows alone: other drafts, same words."""
    base, adapted = fresh_model("llama"), fresh_model("llama")
    generator, seen = torch.Generator().manual_seed(0), []
    down = torch.randn(64, 4, generator=generator)
    up = torch.randn(4, 64, generator=generator)

    def gated(module, arguments, output):
        rows = block_rows()
        if rows is None:
            return output
        seen.append(int(rows.sum()))
        return output + rows[..., None] * (arguments[0] @ down @ up)

    for layer in adapted.get_decoder().layers:
        layer.mlp.register_forward_hook(gated)
    inputs = prompts(7, 12)
    decoder = SelfSpeculativeDecoder(block_size=4)
    assert torch.equal(greedy(adapted, inputs, decoder), greedy(base, inputs))
    assert sum(seen) > 0, "the adapter must have been told of block rows"

    def drafts(model):
        engine, rows = Engine(model, static=False), RowList()  # one path for both, to the last bit
        rows.add_causal([5, 6, 7], 0)
        rows.add_block([MASK] * 4, 3, 3)
        hidden = engine.step([rows], engine.new_cache(1)).hidden_states[0]
        return hidden[:3], hidden[3:]

    (causal, masks), (base_causal, base_masks) = drafts(adapted), drafts(base)
    assert torch.equal(causal, base_causal)
    assert not torch.allclose(masks, base_masks)


def test_eos_and_limits_cut_accepted_drafts(fresh_model, prompts):
    model = fresh_model("llama")
    free = greedy(model, prompts(8), max_new_tokens=24)[0, 8:].tolist()
    for limit in range(1, 12):
        got = greedy(model, prompts(8), SelfSpeculativeDecoder(block_size=5), max_new_tokens=limit)[0, 8:].tolist()
        assert got == free[:limit]
    for place in range(3, 9):
        end = free[place]
        expected = free[: free.index(end) + 1]
        got = greedy(model, prompts(8), SelfSpeculativeDecoder(block_size=5), eos_token_id=end)[0, 8:].tolist()
        assert got == expected


def test_stream_joins_to_the_text(shared_model, prompts, recording_streamer):
    model = shared_model("llama")
    text = greedy(model, prompts(8), SelfSpeculativeDecoder(block_size=4), streamer=recording_streamer)
    puts = recording_streamer.texts("put")
    assert [token for put in puts for token in put] == text[0].tolist()
    assert recording_streamer.calls[-1][0] == "end"


def test_prompt_lookup_needs_no_mask_token_and_helps_on_repetition(fresh_model, prompts):
    model = fresh_model("llama")
    model.generation_config.mask_token_id = None
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 6])}
    decoder = SelfSpeculativeDecoder(draft="prompt_lookup")
    output = model.generate(
        **inputs, max_new_tokens=64, do_sample=False, custom_generate=decoder, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, model.generate(**inputs, max_new_tokens=64, do_sample=False))
    assert output.acceptance_lengths is not None
    with pytest.raises(ValueError, match="mask_token_id"):
        model.generate(**inputs, custom_generate=SelfSpeculativeDecoder(draft="mask"))


@pytest.mark.parametrize(
    ("field", "value"), [("block_size", 1), ("look_ahead", "some"), ("look_ahead", 99), ("draft", "model")]
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SelfSpeculativeDecoder(**{field: value})


def test_next_token_decoder_is_the_reference_for_sampling_too(shared_model, prompts):
    """Next-token decoding draws from the same generators, so equal seeds give equal first tokens."""
    model = shared_model("llama")
    firsts = []
    for decoder in (NextTokenDecoder(), SelfSpeculativeDecoder(block_size=4)):
        torch.manual_seed(3)
        firsts.append(model.generate(**prompts(8), max_new_tokens=1, do_sample=True, custom_generate=decoder)[0, -1])
    assert firsts[0] == firsts[1]
