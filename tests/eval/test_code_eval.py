"""The metric against what the stock one does, and against the references of the data sets."""

import pytest

from eval.code_eval import CodeEval, pass_at_k, sandboxed_code_eval
from eval.tasks import data

ADD = "assert add(2, 3) == 5"


def passes(*candidates: str, test: str = ADD) -> list[bool]:
    _, results = CodeEval().compute(references=[test], predictions=[list(candidates)], k=[1])
    return [outcome["passed"] for _, outcome in results[0]]


def test_nothing_runs_without_consent(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match="confirm-run-unsafe-code"):
        CodeEval().compute(references=[ADD], predictions=[["pass"]])


def test_the_example_of_the_stock_metric(consent):
    scores, results = CodeEval().compute(
        references=[ADD], predictions=[["def add(a, b): return a * b", "def add(a, b): return a + b"]], k=[1, 2, 10]
    )
    assert scores == {"pass@1": 0.5, "pass@2": 1.0}
    (first, failed), (second, passed) = results[0]
    assert (first, second) == (0, 1)
    assert passed == {"task_id": 0, "completion_id": 1, "passed": True, "result": "passed"}
    assert not failed["passed"] and failed["result"].startswith("failed: AssertionError")


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    from itertools import combinations

    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="k must be"):
        pass_at_k(3, 1, 4)


GOOD = "def add(a, b): return a + b\n"


@pytest.mark.parametrize(
    "candidate, passed",
    [
        (GOOD, True),
        ("from __future__ import annotations\n" + GOOD, True),
        (GOOD + "print('x' * 1000)", True),
        (GOOD + "if __name__ == '__main__': raise ValueError", True),
        ("import numpy as np\ndef add(a, b): return int(np.add(a, b))", True),
        ("import math, numpy as np\ndef add(a, b): return int(np.add(a, b))", True),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n  x: int\n" + GOOD, True),
        # What the stock metric takes away.
        (GOOD + "exit()", False),
        (GOOD + "import sys; sys.exit(0)", False),
        (GOOD + "import os; os._exit(0)", False),
        (GOOD + "import os; os.getcwd()", False),
        (GOOD + "import subprocess; subprocess.run(['true'])", False),
        (GOOD + "import resource", False),
        (GOOD + "input()", False),
        (GOOD + "import sys; sys.stdin.read()", False),
        (GOOD + "import sys; sys.stdout.buffer.write(b'x')", False),
        # Wrong in the ordinary way.
        ("def add(a, b): return a - b", False),
        ("def add(a, b) return a + b", False),
        ("", False),
    ],
)
def test_same_verdict_as_the_stock_metric(consent, candidate, passed):
    if "numpy" in candidate:
        pytest.importorskip("numpy")
    assert passes(candidate) == [passed]


def test_an_endless_candidate_times_out(consent):
    _, results = CodeEval().compute(references=[ADD], predictions=[["while True: pass"]], k=[1], timeout=0.2)
    assert results[0][0][1]["result"] == "timed out"


def test_evaluate_gives_the_sandbox_and_only_for_the_time_being(consent):
    evaluate = pytest.importorskip("evaluate", reason="needs lm-eval: install the extra [eval]")
    stock = evaluate.load
    with sandboxed_code_eval():
        assert isinstance(evaluate.load("code_eval"), CodeEval)
    assert evaluate.load is stock


def pass_rate(programs, tests) -> float:
    return CodeEval().compute(references=tests, predictions=[[p] for p in programs], k=[1], timeout=10)[0]["pass@1"]


def test_humaneval_references_pass_and_empty_ones_do_not(consent, data_folder):
    docs = data.humaneval(data_folder)["test"]
    tests = [f"{d['test']}\ncheck({d['entry_point']})" for d in docs]
    assert len(docs) == 164
    assert pass_rate([d["prompt"] + d["canonical_solution"] for d in docs], tests) == 1.0
    assert pass_rate([d["prompt"] + "    return None\n" for d in docs], tests) == 0.0


@pytest.mark.slow
def test_humaneval_plus_references_pass(consent, data_folder):
    docs = data.humaneval_plus(data_folder)["test"]
    tests = [f"{d['test']}\ncheck({d['entry_point']})" for d in docs]
    assert pass_rate([d["prompt"] + d["canonical_solution"] for d in docs], tests) == 1.0
    assert pass_rate([d["prompt"] + "    return None\n" for d in docs], tests) == 0.0
    # HumanEval's own references are not all right, says EvalPlus.
    base = data.humaneval(data_folder)["test"]
    assert 0.9 < pass_rate([d["prompt"] + d["canonical_solution"] for d in base], tests) < 1.0
