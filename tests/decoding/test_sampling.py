"""Distributions and draws: processors applied as transformers applies them, draws that do not depend on the batch."""

import math

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as processors

from decoding.sampling import LogitsPipeline, draw, uniforms

VOCAB = 11


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def pipeline_of(*steps, do_sample: bool = True, forbidden: int | None = None, batch_size: int = 1) -> LogitsPipeline:
    return LogitsPipeline(LogitsProcessorList(steps), do_sample, forbidden, batch_size)


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.4, 0.0, 0.3, 0.2, 0.1, 0.0])
    count = 20000
    tokens = draw(probabilities.expand(count, -1), [torch.Generator().manual_seed(1)] * count)
    seen = torch.bincount(tokens, minlength=6).double()
    assert seen[1] == seen[5] == 0
    expected = probabilities[probabilities > 0].double() * count
    chi_square = ((seen[probabilities > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 0.1 % quantile for 3 degrees of freedom


def test_a_token_of_probability_zero_is_never_drawn(monkeypatch):
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for number in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        monkeypatch.setattr("decoding.sampling.uniforms", lambda *_, u=number: torch.tensor([u], dtype=torch.float64))
        assert draw(probabilities, generators(1)).item() == (1 if number < 0.5 else 3)


def test_draws_do_not_depend_on_the_batch():
    probabilities = random_logits(6).softmax(-1)
    together = draw(probabilities, generators(6))
    alone = torch.cat([draw(probabilities[i : i + 1], [g]) for i, g in enumerate(generators(6))])
    assert torch.equal(together, alone)
    assert len(set(together.tolist())) > 1


def test_one_number_per_row_in_turn():
    g = torch.Generator().manual_seed(3)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    numbers = uniforms([g, g, g], torch.device("cpu"))
    assert torch.equal(numbers, expected) and numbers.dtype == torch.float64


def test_greedy_takes_the_likeliest_and_uses_no_randomness():
    logits, g = random_logits(4), torch.Generator().manual_seed(0)
    state = g.get_state()
    assert torch.equal(pipeline_of(do_sample=False).sample(logits, [g] * 4), logits.argmax(-1))
    assert torch.equal(g.get_state(), state)


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_forbidden_token_is_never_chosen(do_sample):
    pipeline = pipeline_of(do_sample=do_sample, forbidden=4)
    logits = random_logits(200)
    logits[:, 4] += 1e4
    scores = pipeline.process(logits)
    assert scores[:, 4].eq(-math.inf).all()
    tokens = pipeline.sample(scores, generators(200))
    assert (tokens != 4).all() and len(set(tokens.tolist())) > 3


def test_forbidden_before_the_cuts_of_top_k_and_top_p():
    logits = random_logits(50)
    logits[:, 4] += 1e4
    for step in (processors.TopKLogitsWarper(1), processors.TopPLogitsWarper(0.2), processors.MinPLogitsWarper(0.5)):
        scores = pipeline_of(step, forbidden=4).process(logits.clone())
        assert scores.isfinite().any(-1).all() and scores[:, 4].eq(-math.inf).all()


def test_processors_run_in_the_order_given():
    cut, heat = processors.TopPLogitsWarper(0.6), processors.TemperatureLogitsWarper(3.0)
    logits = random_logits(20)
    for steps in ((cut, heat), (heat, cut)):
        expected = steps[1](None, steps[0](None, logits))
        assert torch.equal(pipeline_of(*steps).process(logits.clone()), expected)
    assert not torch.equal(cut(None, heat(None, logits)), heat(None, cut(None, logits)))


def test_processors_that_look_left_get_each_rows_own_context():
    contexts = [[1, 2], [3, 3, 5], [9]]
    step = processors.RepetitionPenaltyLogitsProcessor(2.0)
    logits = random_logits(3)
    scores = pipeline_of(step, batch_size=3).process(logits.clone(), lambda i: (i, contexts[i]))
    expected = torch.cat([step(torch.tensor([c]), logits[i : i + 1].clone()) for i, c in enumerate(contexts)])
    assert torch.equal(scores, expected) and not torch.equal(scores, logits)


def test_processors_with_a_value_per_place_of_the_batch_see_each_row_in_its_place():
    allowed = {0: [1], 1: [2, 3], 2: [4]}
    step = processors.PrefixConstrainedLogitsProcessor(lambda batch_id, ids: allowed[batch_id], num_beams=1)
    places = [2, 0, 1, 1]  # rows of a forward in which the places are out of order and one has two rows
    scores = pipeline_of(step, batch_size=3).process(random_logits(4), lambda i: (places[i], [5]))
    assert [row.isfinite().nonzero().flatten().tolist() for row in scores] == [allowed[place] for place in places]


def test_without_a_context_only_the_others_run():
    heat = processors.TemperatureLogitsWarper(2.0)
    logits = random_logits(3)
    pipeline = pipeline_of(processors.RepetitionPenaltyLogitsProcessor(2.0), heat)
    assert torch.equal(pipeline.process(logits.clone()), logits / 2)


def test_repetition_penalty_leaves_the_forbidden_token_forbidden():
    pipeline = pipeline_of(processors.RepetitionPenaltyLogitsProcessor(2.0), forbidden=4)
    scores = pipeline.process(random_logits(2), lambda i: (0, [4, 4, 5]))
    assert scores[:, 4].eq(-math.inf).all() and not scores.isnan().any()


@pytest.mark.parametrize(
    "step",
    [
        processors.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model=None),
        processors.WatermarkLogitsProcessor(VOCAB, "cpu"),
    ],
    ids=lambda step: type(step).__name__,
)
def test_processors_with_a_state_are_refused_by_name(step):
    with pytest.raises(ValueError, match=type(step).__name__):
        pipeline_of(step)


def test_inside_a_block_only_processors_that_bear_holes():
    pipeline_of(
        processors.TemperatureLogitsWarper(2.0),
        processors.RepetitionPenaltyLogitsProcessor(1.2),
        processors.MinLengthLogitsProcessor(5, 2),
    ).check_holes("SetBlockDecoder")
    with pytest.raises(
        ValueError, match="SetBlockDecoder cannot honour NoRepeatNGramLogitsProcessor.*NextTokenDecoder"
    ):
        pipeline_of(processors.NoRepeatNGramLogitsProcessor(2)).check_holes("SetBlockDecoder")
