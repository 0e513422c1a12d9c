"""Choosing drafts and look-ahead blocks: running estimates, prompt lookup, and the cost of rows."""

from types import SimpleNamespace

import pytest
import torch

from decoding import Engine
from decoding.batch import Sequence
from decoding.forward.costs import RowCosts
from decoding.sampling import UniformStream
from sbd.lossless.acceptance import AcceptanceTable
from sbd.lossless.auto_planner import AutoPlanner
from sbd.lossless.drafts import Draft, PromptLookup
from sbd.lossless.planner import Planner, likeliest
from sbd.lossless.state import SpeculativeState


def test_acceptance_starts_from_confidence_and_learns():
    table = AcceptanceTable(3)
    assert table.rates([0.9, 0.5]) == pytest.approx([0.9, 0.5])
    for _ in range(100):
        table.record([0.9, 0.5], 1)  # the first is always accepted, the second never
    first, second = table.rates([0.9, 0.5])
    assert first > 0.97 and second < 0.03


def test_lengths_are_a_distribution():
    distribution = AcceptanceTable(3).lengths([0.9, 0.5, 0.2])
    assert distribution == pytest.approx([0.1, 0.45, 0.36, 0.09])


def test_record_ignores_drafts_behind_the_first_rejected():
    table = AcceptanceTable(3)
    table.record([0.5, 0.5, 0.5], 0)
    assert [sum(counts) for counts in table.tried] == [1, 0, 0]


def test_lookup_finds_the_longest_and_latest_run():
    lookup = PromptLookup(longest=3)
    assert lookup.find([1, 2, 3, 9, 1, 2, 3], 2) == ([9, 1], 3)
    text = [1, 2, 7, 8, 2, 5, 1, 2]
    assert PromptLookup().find(text, 2) == ([7, 8], 2), "the run (1, 2) beats the later but shorter run (2)"
    assert PromptLookup().find([1, 2, 3, 4], 3) == ([], 0)


@pytest.mark.parametrize(("text", "expected"), [([5, 5], [5, 5, 5, 5]), ([7, 1, 2, 3, 1, 2, 3], [1, 2, 3, 1])])
def test_lookup_goes_on_with_what_repeats_itself(text, expected):
    assert PromptLookup().find(text, 4)[0] == expected


def test_lookup_indexes_text_as_it_grows():
    lookup, text = PromptLookup(), []
    for token in [4, 5, 6, 4, 5]:
        text.append(token)
        found = lookup.find(text, 2)
    assert found == ([6, 4], 2)


def test_likeliest_lengths():
    assert likeliest([0.2, 0.1, 0.4, 0.3], 2) == (2, 3)
    assert likeliest([0.2, 0.1, 0.4, 0.3], 0) == ()


def test_costs_interpolate_and_never_fall():
    costs = RowCosts([1, 8, 16], [2.0, 1.5, 3.0])
    assert costs(1) == 1.5 and costs(8) == 1.5 and costs(12) == 2.25 and costs(32) == 6.0


def test_costs_are_measured_once_for_each_batch_size(shared_model):
    engine = Engine(shared_model("llama"))
    first = engine.row_costs(1, 20)
    assert engine.row_costs(1, 20) is engine.row_costs(1, 12) is first
    assert engine.row_costs(2, 20) is not first
    assert 0 < first(1) <= first(20)


def test_the_draft_that_promises_more_is_taken():
    planner = Planner(8, "all", has_masks=True)
    sure, unsure = Draft([5] * 7, [0.9] * 7), Draft([5] * 7, [0.3] * 7)
    found, text = Draft([6] * 7, [0.5] * 7, source="prompt_lookup"), sequence()
    expected = [planner.expected(text, draft) for draft in (sure, found, unsure, Draft())]
    assert expected == sorted(expected, reverse=True) and expected[2] > expected[3] == 0.0


def sequence(room: int = 100) -> Sequence:
    return Sequence(0, [1, 2, 3], 3 + room, torch.Generator())


def engine_of(seconds_of_a_block: float) -> Engine:
    """One row costs a second; ``seconds_of_a_block`` is what eight more rows add."""
    return Engine(SimpleNamespace(), row_costs=RowCosts([1, 9], [1.0, 1.0 + seconds_of_a_block]))


def planner(seconds_of_a_block: float) -> AutoPlanner:
    return AutoPlanner(8, True, engine_of(seconds_of_a_block))


def test_auto_prepares_everything_when_rows_are_free():
    plan, draft = planner(0.0), Draft([5] * 7, [0.8] * 7)
    assert plan.choose(sequence(), Draft()) == (0, (0,))
    drafts, provided = plan.choose(sequence(), draft)
    assert drafts == 7 and set(provided) == set(range(8))


def test_auto_provides_for_fewer_lengths_when_rows_cost():
    plan, draft = planner(0.15), Draft([5] * 7, [0.95] * 7)
    drafts, provided = plan.choose(sequence(), draft)
    assert drafts == 7 and 1 <= len(provided) < 8 and 7 in provided


def test_auto_falls_back_to_plain_rows_and_tries_again_now_and_then():
    plan, text = planner(0.5), sequence()
    assert plan.choose(text, Draft()) == (0, (0,)), "the first forward drafts, to see"
    useless = Draft([5] * 7, [0.02] * 7)
    drafts, provided = plan.choose(text, useless)
    assert drafts == 0 and provided == (), "a draft that nobody will accept is not verified"
    choices = [plan.choose(text, Draft()) for _ in range(200)]
    trials = sum(choice == (0, (0,)) for choice in choices)
    assert 1 <= trials <= 6


def trials(plan: AutoPlanner, draft: Draft, tokens: int) -> list[int]:
    """Places of the forwards that spend masks to see, in a text whose drafts are all like ``draft``."""
    text, places = sequence(), []
    while text.room > 100 - tokens:
        if plan.choose(text, Draft()) == (0, (0,)):
            places.append(len(text.tokens) - text.prompt_length)
            plan.choose(text, draft)
        text.tokens.append(5)
    return places


def test_auto_remembers_from_text_to_text_whether_drafting_pays():
    engine = engine_of(0.5)
    useless, sure = Draft([5] * 7, [0.02] * 7), Draft([5] * 7, [0.95] * 7)
    first, second = (trials(AutoPlanner(8, True, engine), useless, 80) for _ in range(2))
    assert first[0] == 0 and len(first) > 2
    assert second == [16], "one trial, though the text is new; the next pause is that of the text before"
    assert trials(AutoPlanner(8, True, engine), sure, 80)[:2] == [16, 17], "what pays is seen at the first trial"
    assert trials(AutoPlanner(8, True, engine), sure, 80)[0] == 0
    assert trials(planner(0.5), useless, 10) == [0], "another model has its own"


def test_auto_takes_no_more_drafts_than_there_is_room():
    assert planner(0.0).choose(sequence(room=3), Draft([5] * 7, [0.9] * 7))[0] == 2


def test_lookup_is_judged_by_the_text_even_where_its_drafts_were_not_verified():
    planner, text = Planner(4, "all", False), sequence()
    state = SpeculativeState([PromptLookup()], UniformStream(text.generator), 10)
    table = planner.table(text, "prompt_lookup")

    def watch(tokens, *proposed):
        text.tokens = tokens
        state.watch(planner, text, Draft(list(proposed), [0.5] * len(proposed), source="prompt_lookup"))

    watch([1, 2], 3, 4, 7)
    watch([1, 2, 3], 9)  # right so far: nothing to learn yet, and nothing new is watched
    assert not any(map(any, table.tried))
    watch([1, 2, 3, 5])  # its second token is wrong, its third was never reached
    assert [sum(tried) for tried in table.tried] == [1, 1, 0]
    assert [sum(accepted) for accepted in table.accepted] == [1, 0, 0]
    watch([1, 2, 3, 5, 6], 8, 9)
    watch([1, 2, 3, 5, 6, 8, 9, 1])  # all of it is right
    assert [sum(accepted) for accepted in table.accepted] == pytest.approx([1.97, 1, 0])
