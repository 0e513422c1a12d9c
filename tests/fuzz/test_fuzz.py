"""A net for the next fault: random requests under every exact decoder against ``model.generate``.

FUZZ_SEED=n repeats the case of one seed. FUZZ_SECONDS=n goes on with fresh seeds for so long, as `make fuzz` does.
"""

import os
import random
import time
import warnings

import pytest
import torch

from decoding import Engine, SlotCache
from decoding.batch import UndecidableToken
from tests.conftest import RecordingStreamer
from tests.fuzz.cases import DECODERS, FAMILIES, MASK, MAY_REFUSE, PROCESSORS, SETTINGS, Case, make

CASES = 24  # for each decoder
SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))


def seeds():
    """Those of this run."""
    if "FUZZ_SEED" in os.environ:
        return [int(os.environ["FUZZ_SEED"])]
    return _fresh(time.monotonic() + SECONDS / (2 * len(DECODERS))) if SECONDS else range(CASES)


def _fresh(end: float):
    while time.monotonic() < end:
        yield random.SystemRandom().randrange(10**9)


def for_each_case(kind: str, check) -> list:
    """What ``check(case)`` gives for every case; a failure names the seed."""
    results = []
    for seed in seeds():
        case = make(seed, kind)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(check(case))
        except Exception as error:
            raise AssertionError(f"repeat with FUZZ_SEED={seed} and -k '[{kind}]': {case}") from error
    return results


@pytest.fixture
def forwards(monkeypatch):
    """A list that grows with every forward of the engine."""
    run = []
    original = Engine.forward
    monkeypatch.setattr(Engine, "forward", lambda *arguments: run.append(1) or original(*arguments))
    return run


def refused(kind: str, error: ValueError, forwards: list) -> bool:
    """A refusal: asserts that it may be one, comes before any forward, and says something."""
    assert kind in MAY_REFUSE, "an exact decoder refused"
    assert not forwards, "refused after the model was run"
    assert len(str(error).split()) > 5
    return False


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_text_is_that_of_generate(shared_model, tokenizer, forwards, kind):
    def check(case: Case) -> bool:
        model, inputs = shared_model(case.family), case.inputs()
        cache = SlotCache(model.config.num_hidden_layers) if case.turns > 1 else None
        for turn in range(case.turns):
            stock = model.generate(**inputs, do_sample=False, **case.arguments(tokenizer))
            streamer = RecordingStreamer() if case.streams else None
            forwards.clear()
            try:
                output = model.generate(
                    **inputs,
                    do_sample=False,
                    custom_generate=case.decoder,
                    return_dict_in_generate=True,
                    **case.arguments(tokenizer, streamer=streamer, past_key_values=cache),
                )
            except UndecidableToken as error:  # everything was forbidden: what came before is that of generate
                said = inputs["input_ids"].shape[1] + error.output.new_tokens
                for row, expected, end in zip(error.output.sequences, stock, said.tolist(), strict=True):
                    assert torch.equal(row[:end], expected[:end])
                return False
            except ValueError as error:
                return refused(kind, error, forwards)
            assert torch.equal(output.sequences, stock), f"turn {turn}: {output.sequences.tolist()} != {stock.tolist()}"
            if streamer is not None:
                assert sum(streamer.texts("put"), []) == stock[0].tolist()
            more = torch.tensor([[5 + turn, 60 - turn]])
            inputs = {"input_ids": torch.cat([stock[:1], more], dim=1)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return True

    equal = for_each_case(kind, check)
    assert len(equal) < 10 or sum(equal) >= len(equal) * (0.15 if kind in MAY_REFUSE else 0.9)


@pytest.mark.parametrize("kind", DECODERS)
def test_equal_seeds_give_equal_texts_alone_and_in_a_batch(shared_model, tokenizer, forwards, kind):
    def check(case: Case) -> bool:
        model, inputs = shared_model(case.family), case.inputs()
        pick = random.Random(case.seed)
        distribution = {
            "temperature": pick.choice([0.5, 1.0, 1.5]),
            "top_k": pick.choice([0, 9]),
            "top_p": pick.choice([0.8, 1.0]),
        }
        texts = []
        for rows in (len(case.lengths), len(case.lengths), 1):
            alone = Case(**{**vars(case), "lengths": case.lengths[:rows]})
            if case.criterion:
                alone.criterion = tuple(values[:rows] for values in case.criterion)
            arguments = alone.arguments(tokenizer, do_sample=True, custom_generate=case.decoder, **distribution)
            if "per place" in case.processors:
                arguments["logits_processor"][case.processors.index("per place")].bias = torch.linspace(-3, 3, MASK + 1)
            forwards.clear()
            torch.manual_seed(case.seed)
            try:
                texts.append(model.generate(**{name: x[:rows] for name, x in inputs.items()}, **arguments))
            except UndecidableToken:
                return False
            except ValueError as error:
                return refused(kind, error, forwards)
        again, batch, alone = texts[0], texts[1], texts[2]
        assert torch.equal(again, batch)
        assert torch.equal(batch[0, : alone.shape[1]], alone[0]), f"{batch[0].tolist()} != {alone[0].tolist()}"
        # Without any EOS a row that has ended goes on as long as the others do.
        assert case.settings["eos_token_id"] is None or (batch[0, alone.shape[1] :] == 0).all()
        return True

    equal = for_each_case(kind, check)
    assert len(equal) < 10 or sum(equal) >= len(equal) * (0.15 if kind in MAY_REFUSE else 0.9)


def test_the_cases_are_of_all_sorts():
    """What the net is made of: every setting, processor, batch size and decoder occurs in the bounded run."""
    cases = [make(seed, kind) for kind in DECODERS for seed in range(CASES)]
    assert {name for case in cases for name in case.settings} >= set(SETTINGS)
    assert {name for case in cases for name in case.processors} == set(PROCESSORS)
    assert {len(case.lengths) for case in cases} == {1, 2, 3, 4}
    assert {case.family for case in cases} == set(FAMILIES)
