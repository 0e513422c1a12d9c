"""Evaluations and benchmarks of look_ahead="auto" count the same forwards, whatever the machine is busy with."""

import itertools
import random
import time

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")

from lm_eval.api.instance import Instance

import setflow
from decoding import Engine
from eval.additions import additions
from eval.bench.contenders import Contender
from eval.model import SetflowLM
from eval.repeatable import CPU_MILLISECONDS, ROWS, repeatable_engine

SPECS = ("sbd-lossless:look_ahead=auto", "sbd-lossless:look_ahead=auto,draft=both", "prompt-lookup:look_ahead=auto")
PROBLEMS = [problem.prompt for problem in itertools.islice(additions(seed=5, held_out=True), 3)]


@pytest.fixture(scope="module")
def embedded():
    return setflow.load_embedded()


@pytest.fixture
def busy(monkeypatch):
    """``busy(seed)``: from now on every look at the clock finds another amount of time gone, up to a second."""
    clock = time.perf_counter

    def start(seed: int) -> None:
        draw, now = random.Random(seed), itertools.count()
        elapsed = itertools.accumulate(draw.random() ** 8 for _ in now)
        monkeypatch.setattr(time, "perf_counter", lambda: next(elapsed))

    yield start
    monkeypatch.setattr(time, "perf_counter", clock)


@pytest.mark.parametrize("spec", SPECS)
def test_a_benchmark_counts_the_same_forwards_on_a_busy_machine(embedded, busy, spec):
    model, tokenizer = embedded
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROBLEMS]
    found = []
    for seed in range(3):
        busy(seed)
        contender = Contender(model, spec)
        found.append([(s.new_tokens, s.forwards) for s in (contender.run([p], 40) for p in prompts)])
    assert found[0] == found[1] == found[2]


def test_measured_costs_do_follow_the_clock(embedded, busy):
    """Else the test above would show nothing; the text is the same even so."""
    model, tokenizer = embedded
    prompt, found = tokenizer(PROBLEMS[0])["input_ids"], []
    for seed in range(6):
        busy(seed)
        found.append(Contender(model, SPECS[0], engine=Engine(model)).run([prompt], 40))
    assert len({sample.forwards for sample in found}) > 1
    assert all(sample.new_tokens == found[0].new_tokens for sample in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_evaluation_counts_the_same_forwards_in_any_order(embedded, busy, temperature, tmp_path):
    """Whole, killed and gone on with, and on a busy machine; the texts too, those that are sampled included."""
    model, tokenizer = embedded
    settings = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": temperature > 0, "temperature": temperature}
    requests = [
        Instance("generate_until", {}, (prompt, dict(settings)), 0, metadata=("tiny", i, 1))
        for i, prompt in enumerate(PROBLEMS)
    ]

    def evaluate(seed: int, parts, finished=None):
        busy(seed)
        for part in parts:
            ours = SetflowLM(model, SPECS[0], finished, tokenizer=tokenizer, device="cpu")
            ours.generate_until(part, disable_tqdm=True)
        return [(s["text"], s["tokens"], s["forwards"], s["acceptance_lengths"]) for s in ours.samples]

    whole = evaluate(0, [requests])
    assert evaluate(1, [requests]) == whole
    assert evaluate(2, [requests[2:], requests], tmp_path / "finished.jsonl") == whole


def test_the_recorded_curve_has_no_clock(embedded, busy):
    busy(0)
    costs = repeatable_engine(embedded[0]).row_costs(1, 64)
    assert costs.rows == list(ROWS) and costs(1) == CPU_MILLISECONDS[0] / 1e3
    assert list(CPU_MILLISECONDS) == sorted(CPU_MILLISECONDS)
