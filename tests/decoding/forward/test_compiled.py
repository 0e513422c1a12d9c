"""Compiled graphs of the static path: the same text, one graph for each shape, nothing that a short text waits for."""

import shutil
import warnings
import weakref

import pytest
import torch

from decoding import Engine, NextTokenDecoder
from decoding.forward.static import compiled
from decoding.forward.static import path as static_path
from decoding.forward.static.path import StaticPath
from sbd import EntropyBound, SelfSpeculativeDecoder, SetBlockDecoder
from tests.decoding.forward.test_adapter import adapted

DECODERS = {
    "ntp": NextTokenDecoder(),
    "sbd": SetBlockDecoder(4, EntropyBound(2.0)),
    "lossless": SelfSpeculativeDecoder(block_size=4),
}


@pytest.fixture
def graphs(monkeypatch):
    """Compile by ``backend`` (None is the default one) at the first forward and before it; a list of what was compiled."""
    made = []

    def use(backend: str | None):
        torch._dynamo.reset()

        def work(work):
            made.append(work)
            work()

        monkeypatch.setattr(compiled, "in_background", work)
        monkeypatch.setattr(compiled, "COMPILE_AFTER", 0)
        monkeypatch.setattr(compiled, "LEAST_CAPACITY", 16)  # so that texts outgrow it
        monkeypatch.setattr(static_path, "_kept", weakref.WeakKeyDictionary())
        monkeypatch.setitem(compiled.MODES, True, {} if backend is None else {"backend": backend})
        return made

    return use


def text(model, decoder, arguments, **settings):
    torch.manual_seed(0)
    output = model.generate(
        **arguments,
        max_new_tokens=14,
        do_sample=False,
        custom_generate=decoder,
        engine=Engine(model, cache_chunk=8, **settings),
        return_dict_in_generate=True,
    )
    return output.sequences.tolist(), output.forwards.tolist()


@pytest.mark.parametrize(
    ("family", "decoder", "lengths"), [("llama", "sbd", (9, 4)), ("qwen2-window", "lossless", (9,))], ids=str
)
def test_the_text_is_that_of_the_modules(shared_model, prompts, graphs, family, decoder, lengths):
    """Ragged, behind a sliding window, and while the cache grows; each compilation takes seconds, so only these."""
    made, model, arguments, decoder = graphs("eager"), shared_model(family), prompts(*lengths), DECODERS[decoder]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text(model, decoder, arguments, compile=True) == text(model, decoder, arguments, static=False)
    assert made


def test_a_gated_adapter_is_in_the_graph(fresh_model, prompts, graphs):
    made, model, arguments = graphs("aot_eager"), fresh_model("qwen3"), prompts(9, 4)
    adapted(model)
    assert text(model, DECODERS["sbd"], arguments, compile=True) == text(
        model, DECODERS["sbd"], arguments, static=False
    )
    assert made


def test_one_graph_for_each_shape_and_none_for_another_text(shared_model, prompts, graphs):
    made, model = graphs("eager"), shared_model("llama")
    text(model, DECODERS["ntp"], prompts(9), compile=True)
    count = len(made)
    trunk = StaticPath.of(model)._compiled[True]
    assert count == len(trunk._ready) == 2  # 16 slots, then 32
    text(model, DECODERS["ntp"], prompts(9, seed=3), compile=True)
    assert len(made) == count and StaticPath.of(model)._compiled[True] is trunk


def test_short_texts_never_compile(shared_model, prompts, graphs, monkeypatch):
    made, model = graphs("eager"), shared_model("llama")
    monkeypatch.setattr(compiled, "COMPILE_AFTER", 20)
    text(model, DECODERS["ntp"], prompts(9), compile=True)
    assert not made


def test_without_a_compiler_decoding_goes_on(shared_model, prompts, graphs, monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler was found")

    graphs(broken)
    model, arguments = shared_model("llama"), prompts(9)
    with pytest.warns(UserWarning, match="compile: .*no C\\+\\+ compiler was found.*goes on without it") as seen:
        found = text(model, DECODERS["ntp"], arguments, compile=True)
    assert len(seen) == 1 and found == text(model, DECODERS["ntp"], arguments, static=False)


def test_what_cannot_be_compiled_says_why(fresh_model, prompts):
    model = fresh_model("llama", hidden_act="gelu")
    with pytest.warns(UserWarning, match="compile: not compiled, since hidden_act='gelu'"):
        text(model, DECODERS["ntp"], prompts(5), compile=True)
    with pytest.raises(ValueError, match="compile='cudagraphs' needs a model on CUDA, and this one is on 'cpu'"):
        text(model, DECODERS["ntp"], prompts(5), compile="cudagraphs")
    with pytest.raises(ValueError, match="compile must be one of 'auto', True, False, 'cudagraphs', got 'yes'"):
        Engine(model, compile="yes")


@pytest.mark.slow
def test_inductor_writes_the_same_text(shared_model, prompts, graphs):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("NOT TESTED: torch.compile on this machine, which has no C++ compiler")
    made, model, arguments = graphs(None), shared_model("llama"), prompts(9)
    assert text(model, DECODERS["ntp"], arguments, compile=True) == text(
        model, DECODERS["ntp"], arguments, static=False
    )
    assert made
