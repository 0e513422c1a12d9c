"""Tasks that lm-eval does not have.

mbpp_all, mbpp_sanitized, mbpp_sanitized_all: lm-eval's mbpp on other sets, with everything their tests need.
mbpp_plus_tests: MBPP+ with its additional tests; lm-eval's mbpp_plus runs only those that MBPP has anyway.
additions, next_statement: for small models; they need no data and run no code.
"""

import itertools
from pathlib import Path
from typing import Any

from datasets import Dataset

from eval.additions import Addition, additions
from eval.code_eval import CodeEval
from eval.tasks import data
from eval.tasks.next_statement import NextStatement, compiles, first_statement, next_statements
from eval.tasks.stock import on_records, stock_config

NUM_ADDITIONS = 500
NUM_STATEMENTS = 400
# Some of MBPP+'s inputs keep the reference itself busy for many seconds.
PLUS_SECONDS = 60.0


def pass_at_1_plus(references: list[str], predictions: list[Any]) -> float:
    """Like the stock tasks' pass_at_1, with the time that MBPP+ needs."""
    candidates = [[p] if isinstance(p, str) else p for p in predictions]
    return CodeEval().compute(references=references, predictions=candidates, k=[1], timeout=PLUS_SECONDS)[0]["pass@1"]


def mbpp_tests(doc: dict) -> str:
    """All tests of a problem, behind what they import or set up: code that runs after the solution."""
    if "is_fewshot" in doc:
        return doc["code"] + "\n[DONE]"
    first = [doc["test_setup_code"]] if doc.get("test_setup_code") else doc.get("test_imports", [])
    return "\n".join([*first, *doc["test_list"]])


def mbpp_config(name: str, folder: Path | None) -> dict[str, Any]:
    """One of the MBPP variants; their data are not on the hub in this form."""
    if folder is None:
        raise ValueError(f"task {name!r} needs local data: give --data or SETFLOW_DATA")
    # mbpp_plus is mbpp with a prompt that also takes the sanitized set's name for the problem statement.
    config = on_records({**stock_config("mbpp_plus"), "task": name}, MBPP_VARIANTS[name], folder)
    if name == "mbpp_plus_tests":
        metric = {"metric": pass_at_1_plus, "aggregation": "mean", "higher_is_better": True}
        return {**config, "doc_to_target": _plus_target, "metric_list": [metric]}
    return {**config, "doc_to_target": mbpp_tests}


def _plus_target(doc: dict) -> str:
    return doc["code"] + "\n[DONE]" if "is_fewshot" in doc else doc["test"]


MBPP_VARIANTS = {
    "mbpp_all": data.mbpp_all,
    "mbpp_sanitized": data.mbpp_sanitized,
    "mbpp_sanitized_all": data.mbpp_sanitized_all,
    "mbpp_plus_tests": data.mbpp_plus,
}


def additions_config() -> dict[str, Any]:
    """Worked additions that no training set holds; the last line must state the sum."""
    problems = itertools.islice(additions(seed=0, held_out=True), NUM_ADDITIONS)
    docs = [{"a": p.a, "b": p.b, "prompt": p.prompt, "answer": p.solution} for p in problems]
    return _generate("additions", docs, _score_addition, ["exact_match"], max_gen_toks=256)


def next_statement_config() -> dict[str, Any]:
    """The next statement of held-out library functions; it must match and, counted apart, compile."""
    docs = [{"prompt": p.prompt, "answer": p.answer} for p in next_statements(NUM_STATEMENTS)]
    return _generate("next_statement", docs, _score_statement, ["exact_match", "compiles"], max_gen_toks=64)


def _score_addition(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(Addition(doc["a"], doc["b"]).is_answered_by(results[0]))}


def _score_statement(doc: dict, results: list[str]) -> dict[str, float]:
    problem = NextStatement(doc["prompt"], doc["answer"])
    return {
        "exact_match": float(problem.is_answered_by(results[0])),
        "compiles": float(compiles(first_statement(results[0]))),
    }


def _generate(name: str, docs: list[dict], score, metrics: list[str], max_gen_toks: int) -> dict[str, Any]:
    """Greedy, zero-shot generation up to an empty line."""
    return {
        "task": name,
        "dataset_path": f"eval.tasks.own:{name}",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_target": lambda doc: doc["answer"],
        "target_delimiter": "",
        "process_results": score,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": max_gen_toks, "do_sample": False},
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
