"""Processors and criteria of all sorts: asked as ``generate`` asks them, followed through drafts, or refused by name."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from decoding import NextTokenDecoder
from decoding.processors import can_be_copied, copied, keeps_state
from decoding.sampling import LogitsPipeline
from dfm import FlowDecoder
from rpt import ResampleDecoder
from sbd import SelfSpeculativeDecoder, SetBlockDecoder
from tests.conftest import EOS, MASK, VOCAB

NTP = NextTokenDecoder()
DRAFTING = [
    SelfSpeculativeDecoder(block_size=4),
    SelfSpeculativeDecoder(block_size=4, look_ahead=1, draft="both"),
    SelfSpeculativeDecoder(block_size=6, draft="prompt_lookup"),
]
EXACT = pytest.mark.parametrize("decoder", [NTP, *DRAFTING], ids=["ntp", "mask", "both", "lookup"])
LENGTHS = pytest.mark.parametrize("lengths", [(7,), (7, 4, 9)], ids=["one", "batch"])


def greedy(model, inputs, decoder=None, **settings):
    settings = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": [MASK], **settings}
    return model.generate(**inputs, custom_generate=decoder, **settings)


# --- stateless ones, whatever they do with what they are given


def writes(ids, scores):
    scores[:, :60] = -float("inf")
    return scores


def writes_by_row(ids, scores):
    for row, tokens in zip(scores, ids, strict=True):
        row[tokens] -= 5.0
    return scores


class InPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.div_(2).scatter_(1, input_ids[:, -1:], -50.0)


STATELESS = {
    "function": writes,
    "by row": writes_by_row,
    "object": InPlace(),
    "lambda": lambda ids, scores: scores + (ids[:, -1:] % 7 == torch.arange(VOCAB) % 7) * 4.0,
}


@EXACT
@LENGTHS
@pytest.mark.parametrize("processor", STATELESS.values(), ids=STATELESS)
def test_processors_without_a_state(shared_model, prompts, decoder, lengths, processor):
    model, inputs = shared_model("llama"), prompts(*lengths)
    stock = greedy(model, inputs, logits_processor=[processor])
    assert not torch.equal(stock, greedy(model, inputs))
    assert torch.equal(greedy(model, inputs, decoder, logits_processor=[processor]), stock)


# --- those that count, remember or follow a grammar


class Budget(LogitsProcessor):
    """Forces token 7 as the 8th new one, by counting how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, input_ids, scores):
        self.asked += 1
        if self.asked % 8:
            return scores
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([7]), 0.0)


class Cycle(LogitsProcessor):
    """A grammar with a state for each row: what it allows depends on how far the row has come, and on what it took."""

    def __init__(self):
        self.states = None

    def __call__(self, input_ids, scores):
        if self.states is None:
            self.states = [0] * len(input_ids)
        else:
            self.states = [(s * 3 + int(row[-1]) + 1) % 11 for s, row in zip(self.states, input_ids, strict=True)]
        mask = torch.full_like(scores, -torch.inf)
        for row, state in zip(mask, self.states, strict=True):
            row[3 + state * 8 : 3 + state * 8 + 8] = 0
        return scores + mask


class Memory(LogitsProcessor):
    """Makes what it has ever found likeliest less likely."""

    def __init__(self):
        self.bias = None

    def __call__(self, input_ids, scores):
        self.bias = torch.zeros_like(scores) if self.bias is None else self.bias
        scores = scores - self.bias
        self.bias = self.bias.scatter_add(1, scores.argmax(-1, keepdim=True), torch.full((len(scores), 1), 3.0))
        return scores


STATEFUL = {"budget": Budget, "cycle": Cycle, "memory": Memory}


@EXACT
@LENGTHS
@pytest.mark.parametrize("kind", STATEFUL.values(), ids=STATEFUL)
def test_processors_that_keep_a_state(shared_model, prompts, decoder, lengths, kind):
    model, inputs = shared_model("llama"), prompts(*lengths)
    stock = greedy(model, inputs, logits_processor=[kind()])
    assert not torch.equal(stock, greedy(model, inputs))
    assert torch.equal(greedy(model, inputs, decoder, logits_processor=[kind()]), stock)


@pytest.mark.parametrize("kind", STATEFUL.values(), ids=STATEFUL)
def test_and_rows_that_end_at_different_times(shared_model, prompts, kind):
    model, inputs = shared_model("llama"), prompts(7, 4, 9)
    ends = list(range(30, 50))
    stock = greedy(model, inputs, logits_processor=[kind()], eos_token_id=ends)
    for decoder in (NTP, *DRAFTING):
        assert torch.equal(greedy(model, inputs, decoder, logits_processor=[kind()], eos_token_id=ends), stock)


def test_a_next_token_decoder_asks_once_a_step_about_the_whole_batch(shared_model, prompts):
    seen = {}
    for decoder in (None, NTP):
        calls = seen.setdefault(decoder, [])

        def record(ids, scores, calls=calls):
            calls.append(ids.tolist())
            return scores

        greedy(
            shared_model("llama"),
            prompts(7, 4, 9),
            decoder,
            logits_processor=[record],
            eos_token_id=list(range(30, 50)),
        )
    assert seen[NTP] == seen[None]


def test_drafting_speeds_up_what_keeps_a_state(shared_model):
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8] * 6])}

    class Loop(LogitsProcessor):
        """Allows only the text that goes on as it began, by a place that it keeps."""

        def __init__(self):
            self.place = 0

        def __call__(self, input_ids, scores):
            self.place += 1
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([5 + (self.place - 1) % 4]), 0.0)

    decoder = SelfSpeculativeDecoder(block_size=8, draft="prompt_lookup")
    output = greedy(shared_model("llama"), inputs, decoder, logits_processor=[Loop()], return_dict_in_generate=True)
    assert output.sequences[0, 24:].tolist() == [5, 6, 7, 8] * 5
    assert output.tokens_per_forward.item() > 4


def test_rows_behind_an_end_are_not_asked_about_and_may_still_be_accepted():
    """Logits that a model gives behind an EOS may agree with the drafts there; the commit is cut at the EOS later."""
    pipeline = LogitsPipeline(LogitsProcessorList([Budget()]), do_sample=False, batch_size=1)
    pipeline.follow_drafts("Decoder", VOCAB)
    drafts = [EOS, 5, 6]
    logits = torch.nn.functional.one_hot(torch.tensor([*drafts, 7]), VOCAB).float()
    scores = pipeline.process_drafts(logits.clone(), lambda row: (0, [3, *drafts[:row]]), {EOS})
    assert torch.equal(scores, logits)
    pipeline.commit(0, 4)
    pipeline.process_drafts(logits[:1].clone(), lambda row: (0, [3, EOS]), {EOS})
    assert pipeline.copies[0]._asked[0][0].asked == 2


def counting_function():
    asked = 0

    def count(ids, scores):
        nonlocal asked
        asked += 1
        return scores.index_fill(1, torch.tensor([7]), 1e4) if asked == 8 else scores

    return count


class Handle(LogitsProcessor):
    """Holds what cannot be copied, as matchers of other languages do."""

    def __init__(self):
        self.lines = open(__file__)  # noqa: SIM115

    def __call__(self, input_ids, scores):
        next(self.lines)
        return scores


@pytest.mark.parametrize("make", [counting_function, Handle])
def test_a_state_that_cannot_be_copied_is_refused_before_the_model_runs(shared_model, prompts, count_rows, make):
    model, inputs = shared_model("llama"), prompts(7, 4)
    stock = greedy(model, inputs, logits_processor=[make()])
    assert torch.equal(greedy(model, inputs, NTP, logits_processor=[make()]), stock)
    count_rows.clear()
    name = "count" if make is counting_function else "Handle"
    for decoder in DRAFTING:
        with pytest.raises(ValueError, match=f"SelfSpeculativeDecoder cannot honour {name}.*NextTokenDecoder can"):
            greedy(model, inputs, decoder, logits_processor=[make()])
    assert not count_rows


class Forked(Handle):
    """The same with a way to copy it."""

    def __init__(self, place=0):
        super().__init__()
        self.place = place

    def fork(self):
        return Forked(self.place)

    def __call__(self, input_ids, scores):
        self.place += 1
        return scores.index_fill(1, torch.tensor([self.place % 50 + 5]), 1e4)


def test_what_can_fork_is_forked(shared_model, prompts):
    model, inputs = shared_model("llama"), prompts(7)
    stock = greedy(model, inputs, logits_processor=[Forked()])
    for decoder in DRAFTING:
        assert torch.equal(greedy(model, inputs, decoder, logits_processor=[Forked()]), stock)


@pytest.mark.parametrize(
    "decoder", [SetBlockDecoder(4), FlowDecoder(block_size=4), ResampleDecoder(iterations=0)], ids=repr
)
def test_decoders_that_change_their_mind_refuse_a_state(shared_model, prompts, decoder):
    with pytest.raises(ValueError, match=f"{type(decoder).__name__} cannot honour Budget"):
        greedy(shared_model("llama"), prompts(7), decoder, logits_processor=[Budget()])


def test_a_state_is_found_without_a_trace():
    budget, count = Budget(), counting_function()
    assert keeps_state(budget, VOCAB) and budget.asked == 0 and can_be_copied(budget, VOCAB)
    assert keeps_state(count, VOCAB) and not can_be_copied(count, VOCAB)
    assert not any(keeps_state(processor, VOCAB) for processor in STATELESS.values())


# --- states that no copy holds


ASKED = [0]
TOTAL = 0


def forced(scores, count):
    return scores.index_fill(1, torch.tensor([count % 80 + 5]), 1e4)


class InItsClass(LogitsProcessor):
    asked = 0

    def __call__(self, input_ids, scores):
        InItsClass.asked += 1
        return forced(scores, InItsClass.asked)


class InTheModule(LogitsProcessor):
    def __call__(self, input_ids, scores):
        ASKED[0] += 1
        return forced(scores, ASKED[0])


class LateInTheModule(LogitsProcessor):
    """Says nothing of its state before the eighth token."""

    def __call__(self, input_ids, scores):
        global TOTAL
        TOTAL += 1
        return forced(scores, 7) if TOTAL >= 8 else scores


class OfChance(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.randn(VOCAB)


def by_default(ids, scores, asked=[0]):  # noqa: B006
    asked[0] += 1
    return forced(scores, asked[0])


@pytest.mark.parametrize(
    "processor", [InItsClass(), InTheModule(), LateInTheModule(), OfChance(), by_default], ids=lambda p: str(p)[:20]
)
def test_a_state_outside_of_the_processor_is_refused(shared_model, prompts, count_rows, processor):
    for lengths in ((7,), (7, 4, 9, 9)):
        for decoder in DRAFTING:
            with pytest.raises(ValueError, match="cannot honour .*: it keeps a state.*NextTokenDecoder can"):
                greedy(shared_model("qwen3"), prompts(*lengths), decoder, logits_processor=[processor])
    assert not count_rows


class ByText(LogitsProcessor):
    """Counts how often it has met each text, whatever the place it stands in."""

    def __init__(self):
        self.met = {}

    def __call__(self, input_ids, scores):
        for row, text in zip(scores, input_ids.tolist(), strict=True):
            begins = tuple(text[:3])
            self.met[begins] = self.met.get(begins, 0) + 1
            row[self.met[begins] % 80 + 5] += 60
        return scores


def test_answers_that_depend_on_the_texts_beside_are_refused_in_a_batch(shared_model, prompts, count_rows):
    model = shared_model("mistral")
    for decoder in (NTP, *DRAFTING):
        stock = greedy(model, prompts(7), logits_processor=[ByText()])
        assert torch.equal(greedy(model, prompts(7), decoder, logits_processor=[ByText()]), stock)
    batch = prompts(7, 8, 9)
    stock = greedy(model, batch, logits_processor=[ByText()])
    assert torch.equal(greedy(model, batch, NTP, logits_processor=[ByText()]), stock)
    count_rows.clear()
    for decoder in DRAFTING:
        with pytest.raises(ValueError, match="cannot honour ByText in a batch: .*the texts beside it"):
            greedy(model, batch, decoder, logits_processor=[ByText()])
    assert not count_rows


def test_a_model_that_a_processor_holds_is_not_copied(fresh_model):
    budget = Budget()
    budget.guide = fresh_model("llama")
    assert keeps_state(budget, VOCAB) and can_be_copied(budget, VOCAB)
    assert copied(budget).guide is budget.guide
