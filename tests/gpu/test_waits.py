"""How often the host waits for the GPU in a step: once, for what was decided.

``torch.cuda.set_sync_debug_mode("warn")`` warns of every call that waits, with the line that made it.
"""

import collections
import warnings
from pathlib import Path

import pytest
import torch

from decoding import Engine, decoder_from_spec
from tests.conftest import MASK

LOSSLESS = "sbd-lossless:block_size=4"
ONCE = (
    "ntp",
    "sbd:block_size=5,entropy_bound=1.5",
    "sbd:block_size=5,entropy_bound=1.5,anchor=true,commit=prefix",
    *(f"{LOSSLESS},look_ahead={look_ahead}" for look_ahead in ("all", "alternate", 0, 2)),
    f"{LOSSLESS},draft=both",
    "prompt-lookup:block_size=4",
)
GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9}


class Watch:
    """Counts, for each method that it wraps, calls and the lines in which they wait."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls, self.waits, self.most = (collections.Counter() for _ in range(3))

    def wrap(self, kind: type, method: str) -> None:
        original = getattr(kind, method)

        def watched(*arguments, **settings):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    result = original(*arguments, **settings)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            lines = [
                f"{Path(entry.filename).name}:{entry.lineno}"
                for entry in found
                if "called a synchronizing" in str(entry.message)
            ]
            self.calls[method] += 1
            self.waits.update((method, line) for line in lines)
            self.most[method] = max(self.most[method], len(lines))
            return result

        self.monkeypatch.setattr(kind, method, watched)

    def __str__(self) -> str:
        lines = (f"{method} {line} {n / self.calls[method]:.2f}" for (method, line), n in sorted(self.waits.items()))
        return "; ".join(lines) or "none"


@pytest.fixture
def run(monkeypatch, gpu_model, gpu_prompts, record_property):
    """``run(spec, lengths, settings)`` decodes, reports the waits of each step and returns the Watch."""

    def watched(spec: str, lengths: tuple[int, ...], settings: dict) -> Watch:
        decoder, watch = decoder_from_spec(spec), Watch(monkeypatch)
        model, inputs = gpu_model("qwen3"), gpu_prompts(*lengths)
        arguments = {"max_new_tokens": 16, "suppress_tokens": [MASK], "custom_generate": decoder, **settings}
        model.generate(**inputs, **arguments)  # what is loaded late may wait
        watch.wrap(type(decoder), "absorb")
        watch.wrap(Engine, "step")
        model.generate(**inputs, **arguments)
        record_property(f"waits of a step, {spec}, batch {len(lengths)}, {settings}", str(watch))
        assert watch.calls["absorb"] > 3
        return watch

    return watched


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [(7,), (7, 12, 4)], ids=["one", "ragged"])
@pytest.mark.parametrize("spec", ONCE)
def test_a_step_waits_once_for_what_was_decided(run, spec, lengths, settings):
    watch = run(spec, lengths, settings)
    assert watch.most["absorb"] == 1 and watch.most["step"] == 0, str(watch)


@pytest.mark.parametrize("spec", ["sbd:block_size=5,top_k=2,revise=remask", "dfm:block_size=5", "rpt:iterations=0"])
def test_what_other_decoders_wait_for_is_told(run, spec):
    """Nothing is promised of these but that running rows never waits."""
    watch = run(spec, (7, 12, 4), GREEDY)
    assert watch.waits.total() > 0 and watch.most["step"] == 0, str(watch)


def test_the_watch_sees_waits(monkeypatch):
    class Waiting:
        def once(self):
            return torch.ones(2, device="cuda").sum().item()

        def never(self):
            return torch.ones(2).to("cuda", non_blocking=True) + 1

    watch = Watch(monkeypatch)
    watch.wrap(Waiting, "once")
    watch.wrap(Waiting, "never")
    waiting = Waiting()
    for _ in range(2):
        waiting.once()
        waiting.never()
    assert watch.most == {"once": 1, "never": 0} and watch.waits.total() == 2
    assert "test_waits.py" in str(watch)
