"""Where a sequence ends: the first EOS, stop string or criterion, exact inside a run of new tokens."""

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StopStringCriteria,
)

from decoding.batch import Stopping

CPU = torch.device("cpu")


class StopAtLength(StoppingCriteria):
    def __init__(self, length: int):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids[0].tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(("new", "kept"), [([2, 5], 1), ([8, 2, 5], 2), ([7, 5, 6], 2), ([8, 9], None), ([], None)])
def test_cut_behind_the_first_eos(new, kept):
    assert Stopping(frozenset({2, 5})).cut([2, 5, 5], new) == kept


def test_eos_in_the_prompt_does_not_stop():
    assert Stopping(frozenset({2})).cut([2], [3]) is None


def test_criteria_see_every_prefix_until_one_stops():
    criterion = StopAtLength(5)
    assert Stopping(criteria=(criterion,)).cut([1, 2, 3], [7, 8, 9]) == 2
    assert criterion.asked == [[1, 2, 3, 7], [1, 2, 3, 7, 8]]


def test_the_earlier_of_eos_and_criterion_wins():
    stopping = Stopping(frozenset({4}), (StopAtLength(3),))
    assert stopping.cut([1], [4, 6]) == 1
    assert stopping.cut([1], [6, 6, 4]) == 2


@pytest.mark.parametrize(
    ("text", "kept"),
    [("xyzend.", "xyzend"), ("the STOP", "the STOP"), ("xSTOxSTOPx", "xSTOxSTOP"), ("xSTO", None), ("a\n\nb", "a\n\n")],
)
def test_stop_strings_cut_at_the_token_that_completes_them(tokenizer, text, kept):
    criterion = StopStringCriteria(tokenizer, ["end", "STOP", "\n\n"])
    pieces = ["\n\n" if piece == "\n" else piece for piece in text.replace("\n\n", "\n")]
    new = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    assert tokenizer.decode(new) == text
    count = Stopping(criteria=(criterion,)).cut(tokenizer("prompt")["input_ids"], new)
    assert count == (None if kept is None else len(pieces) - (len(text) - len(kept)))


def test_a_token_may_hold_more_than_the_stop_string(tokenizer):
    criterion = StopStringCriteria(tokenizer, ["g"])
    new = [tokenizer.convert_tokens_to_ids(piece) for piece in ("x", "ing ", "y")]
    assert Stopping(criteria=(criterion,)).cut([5], new) == 2


@pytest.mark.parametrize(("eos", "ids"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_eos_ids_of_the_generation_config(eos, ids):
    assert Stopping.from_generate(GenerationConfig(eos_token_id=eos, max_length=9), None, CPU).eos_token_ids == ids


def test_what_generate_prepared_is_counted_and_not_asked():
    own = StopAtLength(4)
    config = GenerationConfig(eos_token_id=[7], max_length=9)
    criteria = StoppingCriteriaList([MaxLengthCriteria(9), EosTokenCriteria([7]), own])
    stopping = Stopping.from_generate(config, criteria, CPU)
    assert stopping.foreign == (own,) and stopping.criteria == () and stopping.eos_token_ids == {7}


def test_a_users_own_eos_and_length_criteria_count():
    config = GenerationConfig(eos_token_id=None, max_length=9)
    stopping = Stopping.from_generate(config, StoppingCriteriaList([EosTokenCriteria(5), MaxLengthCriteria(6)]), CPU)
    assert stopping.cut([1, 2], [3, 5, 3]) == 2
    assert stopping.cut([1, 2], [3, 3, 3, 3, 3]) == 4
