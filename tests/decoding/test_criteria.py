"""Stopping criteria of all sorts: per row or for the batch, with a state or without, they end what ``generate`` ends."""

import pytest
import torch
from transformers import StoppingCriteria

from decoding import NextTokenDecoder
from rpt import ResampleDecoder
from sbd import SelfSpeculativeDecoder, SetBlockDecoder
from tests.conftest import BOS, MASK

DECODERS = {
    "ntp": NextTokenDecoder(),
    "mask": SelfSpeculativeDecoder(block_size=4),
    "lookup": SelfSpeculativeDecoder(block_size=6, draft="prompt_lookup"),
    "sbd": SetBlockDecoder(block_size=1),
    "rpt": ResampleDecoder(iterations=0),
}
EVERY = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)


class Counting(StoppingCriteria):
    """Ends all rows when it is asked for the seventh time."""

    asked = 0

    def __call__(self, input_ids, scores, **settings):
        self.asked += 1
        return torch.full((len(input_ids),), self.asked >= 7)


class Latched(StoppingCriteria):
    """Remembers for each place whether it has ever said a late token."""

    done = None

    def __call__(self, input_ids, scores, **settings):
        self.done = input_ids[:, -1] > 70 if self.done is None else self.done | (input_ids[:, -1] > 70)
        return self.done


class AllOfThem(StoppingCriteria):
    """One answer for the batch, as in lm-eval: stops when every place has said what it waits for."""

    done = None

    def __call__(self, input_ids, scores, **settings):
        self.done = self.done or [False] * len(input_ids)
        for place, row in enumerate(input_ids.tolist()):
            self.done[place] = self.done[place] or row[-1] > 50
        return all(self.done)


class FromTheFirst(StoppingCriteria):
    """Measures from where it was first asked, for each place its own length."""

    start = None

    def __call__(self, input_ids, scores, **settings):
        self.start = self.start or input_ids.shape[1]
        return torch.tensor([input_ids.shape[1] - self.start >= 3 + 4 * place for place in range(len(input_ids))])


KINDS = pytest.mark.parametrize("kind", [Counting, Latched, AllOfThem, FromTheFirst])


def greedy(model, inputs, decoder=None, **settings):
    settings = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [MASK], **settings}
    return model.generate(**inputs, custom_generate=decoder, **settings)


@EVERY
@KINDS
@pytest.mark.parametrize("lengths", [(7,), (7, 4, 9, 9)], ids=["one", "batch"])
@pytest.mark.parametrize("eos", [BOS, list(range(30, 36))], ids=["never", "some"])
def test_criteria_with_a_state_or_one_answer_for_all(shared_model, prompts, decoder, kind, lengths, eos):
    model, inputs = shared_model("qwen2"), prompts(*lengths)
    stock = greedy(model, inputs, stopping_criteria=[kind()], eos_token_id=eos)
    assert torch.equal(greedy(model, inputs, decoder, stopping_criteria=[kind()], eos_token_id=eos), stock)


@EVERY
def test_they_are_asked_as_generate_asks_them(shared_model, prompts, decoder):
    """Once a step about the whole batch, in the same words, with ended rows filled up."""
    seen = {}
    for asks in (None, decoder):

        class Recorder(StoppingCriteria):
            calls = seen.setdefault(asks, [])

            def __call__(self, input_ids, scores, **settings):
                self.calls.append(input_ids.tolist())
                return torch.tensor([row[-1] in (40, 50, 60) for row in input_ids.tolist()])

        greedy(
            shared_model("llama"),
            prompts(7, 4, 9),
            asks,
            stopping_criteria=[Recorder()],
            eos_token_id=list(range(30, 50)),
        )
    assert seen[decoder] == seen[None]


@EVERY
def test_what_a_sequence_lost_is_not_counted(shared_model, prompts, decoder):
    """The figures of a sequence that ran ahead of the others are those up to its end."""
    model, inputs = shared_model("llama"), prompts(7, 4, 9)
    settings = {"eos_token_id": BOS, "return_dict_in_generate": True}
    output = greedy(model, inputs, decoder, stopping_criteria=[FromTheFirst()], **settings)
    assert output.new_tokens.tolist() == [4, 8, 12]
    for place, count in enumerate(output.new_tokens.tolist()):
        assert len(output.trace[place]) == count
        assert max(output.trace[place]) <= output.forwards[place]
        row = {name: value[place : place + 1] for name, value in inputs.items()}
        alone = greedy(model, row, decoder, max_new_tokens=count, **settings)
        assert torch.equal(alone.sequences[0], output.sequences[place, : alone.sequences.shape[1]])
        if not isinstance(decoder, SelfSpeculativeDecoder):  # which plans its last forwards by the room that is left
            assert output.forwards[place] == alone.forwards[0]


CRITERIA = {
    "per row": lambda ids, scores, **k: torch.tensor([(ids.shape[1] - 9) >= limit for limit in (5, 12, 8)][: len(ids)]),
    "one for all": lambda ids, scores, **k: ids.shape[1] >= 9 + 6,
    "by what was said": lambda ids, scores, **k: ids[:, -1] > 80,
    "a tensor of one": lambda ids, scores, **k: torch.tensor(ids.shape[1] >= 20),
}


@EVERY
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
def test_criteria_are_asked_with_the_whole_batch(shared_model, prompts, decoder, criterion):
    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **settings):
            stops = torch.as_tensor(criterion(input_ids, scores))
            return stops.expand(len(input_ids)) if stops.dim() == 0 else stops

    model, inputs = shared_model("llama"), prompts(7, 4, 9)
    settings = {"stopping_criteria": [Criterion()], "eos_token_id": 1}  # without an EOS generate goes on in ended rows
    stock = greedy(model, inputs, **settings)
    assert stock.shape[1] < 29
    assert torch.equal(greedy(model, inputs, decoder, **settings), stock)


@EVERY
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
@pytest.mark.parametrize("lengths", [(7,), (7, 4, 9)], ids=["one", "batch"])
def test_without_any_eos_rows_go_on_until_all_have_ended(shared_model, prompts, decoder, criterion, lengths):
    """As in ``generate``, which fills up ended rows only where something names an EOS."""

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **settings):
            stops = torch.as_tensor(criterion(input_ids, scores))
            return stops.expand(len(input_ids)) if stops.dim() == 0 else stops

    model, inputs = shared_model("llama"), prompts(*lengths)
    stock = greedy(model, inputs, stopping_criteria=[Criterion()])
    assert torch.equal(greedy(model, inputs, decoder, stopping_criteria=[Criterion()]), stock)


@EVERY
def test_stop_strings_without_any_eos(shared_model, prompts, tokenizer, decoder):
    model, inputs = shared_model("llama"), prompts(7, 4, 9)
    ended = tokenizer.decode(greedy(model, inputs)[0, -18:-16])
    settings = {"stop_strings": [ended, "e"], "tokenizer": tokenizer, "max_new_tokens": 30}
    assert torch.equal(greedy(model, inputs, decoder, **settings), greedy(model, inputs, **settings))
