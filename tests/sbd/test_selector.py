"""Dependent drafts: the walk is the formula, and the text and its distribution are the model's, however drafts depend."""

import itertools

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from decoding import Engine
from decoding.batch import Batch, Sequence, Stopping
from decoding.decoder import decode
from decoding.forward.costs import RowCosts
from decoding.sampling import LogitsPipeline, inverse_cdf
from sbd import SelfSpeculativeDecoder
from sbd.lossless.acceptance import AcceptanceTable
from sbd.lossless.auto_planner import AutoPlanner
from sbd.lossless.drafts import Draft
from sbd.lossless.drawing import Candidates, DependentDrafter, draw_independent
from sbd.lossless.planner import Planner
from sbd.selector import attach_selector
from tests.conftest import MASK, chi_square_z


def with_selector(model, rank: int = 8, strength: float = 1.0, seed: int = 0):
    """``model`` with a random selector that matters."""
    torch.manual_seed(seed)
    selector = attach_selector(model, rank)
    torch.nn.init.normal_(selector.correction.weight, std=strength)
    return model


def drafter_inputs(model, batch: int = 3, drafts: int = 4):
    hidden = torch.randn(batch, drafts, 64, generator=torch.Generator().manual_seed(1))
    return hidden, torch.tensor([5, 9, 20][:batch]), lambda states: model.lm_head(states).float()


def walk_by_the_formula(model, head, hidden, before, uniform, temperature: float, count: int):
    """q_j = softmax((head(h_j + correction)) / T) on the ``count`` likeliest tokens of row j alone, one after the other."""
    tokens, distributions = [], []
    for j in range(hidden.shape[1]):
        own = head(hidden[:, j])
        own[:, MASK] = -torch.inf
        kept = own.topk(count).indices
        corrected = head(model.draft_selector(hidden[:, j], model.get_input_embeddings()(before)))
        scores = torch.full_like(own, -torch.inf).scatter(1, kept, corrected.gather(1, kept))
        scores[:, MASK] = -torch.inf
        distributions.append((scores / temperature).softmax(-1))
        if uniform is None:
            before = scores.argmax(-1)
        else:  # the same number of the same order of candidates
            chosen = inverse_cdf(distributions[-1].gather(1, kept), uniform[:, j])
            before = kept.gather(1, chosen[:, None])[:, 0]
        tokens.append(before)
    return torch.stack(tokens, 1), torch.stack(distributions, 1)


@pytest.mark.parametrize("count", [1, 4, 16, MASK + 1])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_walk_over_candidates_is_the_formula_token_by_token(fresh_model, count, sampled):
    model = with_selector(fresh_model("llama"))
    hidden, before, head = drafter_inputs(model)
    uniform = torch.rand(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if sampled else None
    pipeline = LogitsPipeline(LogitsProcessorList([TemperatureLogitsWarper(1.7)]), sampled, MASK)
    drawn = DependentDrafter.of_model(model, count).draw(pipeline, head, hidden, before, uniform)
    tokens, distributions = walk_by_the_formula(model, head, hidden, before, uniform, 1.7, count)
    assert torch.equal(drawn.tokens, tokens) and not (drawn.tokens == MASK).any()
    for i in range(3):
        torch.testing.assert_close(drawn.drawn_from(i)[1].spread(MASK + 1), distributions[i], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(drawn.confidences, distributions.amax(-1), atol=1e-5, rtol=1e-4)


def test_a_selector_that_has_learned_nothing_drafts_as_the_rows_alone(fresh_model):
    model = fresh_model("llama")
    attach_selector(model, 4)
    hidden, before, head = drafter_inputs(model)
    pipeline = LogitsPipeline(LogitsProcessorList(), False, MASK)
    dependent = DependentDrafter.of_model(model, MASK + 1).draw(pipeline, head, hidden, before, None)
    alone = draw_independent(pipeline, head, hidden, None)
    assert torch.equal(dependent.tokens, alone.tokens)
    torch.testing.assert_close(dependent.confidences, alone.confidences)


def test_drafts_follow_the_token_that_verification_gave(fresh_model):
    model = with_selector(fresh_model("llama"), strength=3.0)
    hidden, before, head = drafter_inputs(model)
    drafter = DependentDrafter.of_model(model, 16)
    pipeline = LogitsPipeline(LogitsProcessorList(), False, MASK)
    one = drafter.draw(pipeline, head, hidden, before, None).tokens
    other = drafter.draw(pipeline, head, hidden, before + 30, None).tokens
    assert (one[:, 0] != other[:, 0]).any()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("look_ahead", ["all", "alternate", 1, "auto"])
def test_greedy_text_equals_generate(fresh_model, prompts, family, look_ahead):
    model, inputs = with_selector(fresh_model(family)), prompts(5, 12, 9)
    settings = {"max_new_tokens": 24, "do_sample": False, "suppress_tokens": [MASK, 7]}
    expected = model.generate(**inputs, **settings)
    decoder = SelfSpeculativeDecoder(block_size=5, look_ahead=look_ahead, draft="both")
    assert torch.equal(model.generate(**inputs, custom_generate=decoder, **settings), expected)


def test_candidates_0_leaves_the_selector_aside(fresh_model, prompts):
    plain, model, inputs = fresh_model("llama"), with_selector(fresh_model("llama"), strength=3.0), prompts(5, 12)
    settings = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    without = plain.generate(**inputs, custom_generate=SelfSpeculativeDecoder(block_size=5), **settings)
    aside = model.generate(**inputs, custom_generate=SelfSpeculativeDecoder(block_size=5, candidates=0), **settings)
    used = model.generate(**inputs, custom_generate=SelfSpeculativeDecoder(block_size=5), **settings)
    assert aside.acceptance_lengths == without.acceptance_lengths != used.acceptance_lengths
    with pytest.raises(ValueError, match="candidates must be 0 for a model without a draft selector, got 4"):
        plain.generate(**inputs, custom_generate=SelfSpeculativeDecoder(block_size=5, candidates=4), **settings)


def test_sampled_text_does_not_depend_on_the_batch(fresh_model, prompts):
    model, inputs = with_selector(fresh_model("llama")), prompts(6, 11, 8)
    engine, decoder = Engine(model), SelfSpeculativeDecoder(block_size=4, draft="both")

    def run(rows):
        sequences = []
        for i in rows:
            ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()].tolist()
            sequences.append(Sequence(len(sequences), ids, len(ids) + 30, torch.Generator().manual_seed(40 + i)))
        warpers = LogitsProcessorList([TemperatureLogitsWarper(3.0)])
        batch = Batch(sequences, LogitsPipeline(warpers, True, MASK, len(sequences)), Stopping(), MASK)
        decode(engine, decoder, batch, engine.new_cache(len(sequences)))
        return [(sequence.new_tokens, sequence.forwards) for sequence in sequences]

    alone = [run([i])[0] for i in range(3)]
    assert run(range(3)) == alone and run([2, 0]) == [alone[2], alone[0]]


# The distribution of sampled text, against the exact one by enumeration. Tokens 0 .. 4, of which 4 is the mask.

VOCABULARY, LENGTH, PROMPT, TEMPERATURE = 5, 4, [1, 2, 3], 1.2


@pytest.fixture(scope="module")
def tiny():
    """A tiny model with a strong selector, and the exact distribution [V, V, V, V] of four tokens after the prompt."""
    from tests.conftest import build

    model = build("llama", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    with_selector(model, strength=0.8)
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
    ids = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], dim=1)
    logits = model(input_ids=ids).logits[:, 2:-1].double()
    logits[..., VOCABULARY - 1] = -torch.inf
    p = (logits / TEMPERATURE).softmax(-1).gather(-1, texts[..., None]).squeeze(-1).prod(-1)
    return model, p.view((VOCABULARY,) * LENGTH)


def samples(model, decoder, engine=None, runs: int = 3) -> torch.Tensor:
    torch.manual_seed(0)
    arguments = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "num_return_sequences": 2000}
    arguments |= {"max_new_tokens": LENGTH, "custom_generate": decoder, "engine": engine}
    return torch.cat([model.generate(torch.tensor([PROMPT]), **arguments)[:, 3:] for _ in range(runs)])


@pytest.mark.parametrize("candidates", [2, 16])
def test_sampled_text_has_the_next_token_distribution(tiny, candidates):
    """Also where most tokens are no candidates."""
    model, p = tiny
    assert chi_square_z(samples(model, SelfSpeculativeDecoder(block_size=4, candidates=candidates)), p) < 3.8


def test_the_stopping_rule_keeps_the_distribution(tiny, monkeypatch):
    """look_ahead="auto" verifies fewer drafts where they promise little; costs are such that it does so now and then."""
    model, p = tiny
    counts, choose = [], AutoPlanner.choose

    def watched(self, sequence, draft):
        drafts, provided = choose(self, sequence, draft)
        if draft.candidates is not None and sequence.room > 2:
            counts.append(drafts)
        return drafts, provided

    monkeypatch.setattr(AutoPlanner, "choose", watched)
    engine = Engine(model, row_costs=RowCosts([1, 30], [1.0, 15.5]))
    found = samples(model, SelfSpeculativeDecoder(block_size=4, look_ahead="auto"), engine)
    assert min(counts.count(1), counts.count(2)) > len(counts) / 10, "the rule should stop at different drafts"
    assert chi_square_z(found, p) < 3.8


def test_a_choice_by_later_distributions_does_not(tiny, monkeypatch):
    """Negative control: with dependent drafts q_2 tells of x_1, so it may not decide whether x_1 is verified."""
    model, p = tiny
    choose = Planner.choose

    def by_later_distributions(self, sequence, draft):
        drafts, provided = choose(self, sequence, draft)
        if draft.candidates is not None and drafts > 1 and draft.confidences[1] < 0.8:
            return 0, (0,)
        return drafts, provided

    monkeypatch.setattr(Planner, "choose", by_later_distributions)
    assert chi_square_z(samples(model, SelfSpeculativeDecoder(block_size=4)), p) > 6


def test_the_rule_never_looks_ahead(monkeypatch):
    """Whether draft j is verified does not change with anything that is only known after it was drawn."""
    costs = RowCosts([1, 2, 3, 4, 5, 40], [1.0, 1.3, 1.6, 1.9, 2.2, 9.0])
    engine = Engine(torch.nn.Identity(), row_costs=costs)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        first, second = torch.rand(2, 4, generator=generator).tolist()
        j = int(torch.randint(1, 4, (), generator=generator))
        planned = []
        for confidences in (first, first[:j] + second[j:]):
            planner = AutoPlanner(5, True, engine)
            planner.prospects.clear()
            candidates = Candidates(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
            sequence = Sequence(0, [1, 2, 3], 40, torch.Generator())
            planned.append(planner.choose(sequence, Draft([1, 2, 3, 4], confidences, candidates=candidates))[0])
        seen.update(planned)
        # Draft i + 1 is decided upon knowing the confidences of drafts up to i + 1.
        assert min(planned) >= j or planned[0] == planned[1]
    assert len(seen) > 2


def test_acceptance_where_no_confidence_is_known_is_the_mean_of_its_offset():
    table = AcceptanceTable(3)
    assert table.rates([0.9], 3) == pytest.approx([0.9, 0.5, 0.5])
    for _ in range(200):
        table.record([0.9, 0.2, 0.6], 2)
    first, second, third = table.rates([0.9], 3)
    assert first > 0.97 and second > 0.95 and third < 0.05
