"""How often a step waits for the device: deciding takes one copy to the host, greedy and sampled, whatever the batch."""

import pytest
import torch

from decoding import Engine, NextTokenDecoder
from sbd import ConfidenceThreshold, EntropyBound, SelfSpeculativeDecoder, SetBlockDecoder

WAITS = {
    "tolist",
    "item",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "masked_select",
    "unique",
}


class OnDevice(torch.Tensor):
    """A tensor as it would be on a device: what is computed from it is one, too, and what reads its values is counted."""

    waits: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        name = function.__name__
        by_mask = name == "__getitem__" and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],))
        )
        if name in WAITS or by_mask or (name == "to" and "cpu" in map(str, arguments[1:])):
            cls.waits.append(name)
        return super().__torch_function__(function, types, arguments, named or {})


class DeviceEngine(Engine):
    """Notes how often the values of what its forwards gave are read, from one forward to the next."""

    def __init__(self, model):
        super().__init__(model)
        self.per_step = []

    def forward(self, rows, cache):
        self.per_step.append(len(OnDevice.waits))
        OnDevice.waits.clear()
        return super().forward(rows, cache).as_subclass(OnDevice)


DECODERS = {
    "ntp": NextTokenDecoder(),
    "all": SelfSpeculativeDecoder(block_size=4),
    "alternate": SelfSpeculativeDecoder(block_size=4, look_ahead="alternate"),
    "one": SelfSpeculativeDecoder(block_size=4, look_ahead=1),
    "both": SelfSpeculativeDecoder(block_size=4, draft="both"),
    "lookup": SelfSpeculativeDecoder(block_size=4, draft="prompt_lookup"),
    "entropy": SetBlockDecoder(4, EntropyBound(2.0)),
    "threshold": SetBlockDecoder(4, ConfidenceThreshold(0.2), anchor=True, commit="prefix"),
}


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True, "top_k": 20, "top_p": 0.9}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 6)], ids=["one", "batch"])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_one_copy_to_the_host_for_each_step(shared_model, prompts, decoder, lengths, settings):
    OnDevice.waits.clear()
    model = shared_model("llama")
    engine = DeviceEngine(model)
    output = model.generate(
        **prompts(*lengths),
        max_new_tokens=24,
        custom_generate=decoder,
        engine=engine,
        return_dict_in_generate=True,
        **settings,
    )
    per_step = [*engine.per_step[1:], len(OnDevice.waits)]
    assert len(per_step) == output.forwards.max() and set(per_step) == {1}


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("decoder, calls", [("ntp", 1), ("lookup", 1), ("all", 2), ("both", 2)])
def test_calls_of_the_head_in_a_step(shared_model, prompts, decoder, calls, do_sample):
    """What drafts next can be chosen only once it is known how many drafts passed; all else goes through the head together."""
    model, per_step = shared_model("llama"), [0]

    class CountingEngine(Engine):
        def forward(self, rows, cache):
            per_step.append(0)
            return super().forward(rows, cache)

        def head(self, hidden):
            per_step[-1] += 1
            return super().head(hidden)

    model.generate(
        **prompts(9, 4),
        max_new_tokens=24,
        custom_generate=DECODERS[decoder],
        engine=CountingEngine(model),
        do_sample=do_sample,
    )
    assert max(per_step) == calls


def test_log_probabilities_come_with_the_same_copy(shared_model, prompts):
    model = shared_model("llama")
    engine, settings = (
        DeviceEngine(model),
        {"output_logprobs": True, "return_dict_in_generate": True, "do_sample": False},
    )
    OnDevice.waits.clear()
    model.generate(**prompts(9, 4), max_new_tokens=24, custom_generate=DECODERS["all"], engine=engine, **settings)
    assert set(engine.per_step[1:]) == {1}


def test_what_waits_is_seen(shared_model, prompts):
    """The control: a decoder that looks once more at its logits."""

    class Looks(NextTokenDecoder):
        def absorb(self, batch, step):
            assert bool(step.hidden_states.isfinite().all())
            super().absorb(batch, step)

    model = shared_model("llama")
    engine = DeviceEngine(model)
    OnDevice.waits.clear()
    model.generate(**prompts(9), max_new_tokens=5, custom_generate=Looks(), engine=engine)
    assert set(engine.per_step[1:]) == {2}
