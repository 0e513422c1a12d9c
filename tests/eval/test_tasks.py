"""lm-eval's tasks on local data and our own: references get 1, nonsense gets 0, prompts are lm-eval's."""

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")

from eval.code_eval import CodeEval
from eval.tasks import OWN, data, load_task
from eval.tasks.own import mbpp_tests
from eval.tasks.stock import find_definition


def solution(doc: dict) -> str:
    return doc["canonical_solution"] if "canonical_solution" in doc else doc["code"]


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_tasks_that_run_code_need_consent(name, monkeypatch, data_folder):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match="confirm-run-unsafe-code"):
        load_task(name, data_folder)


def test_unknown_names_and_missing_data_are_refused(tmp_path, consent, monkeypatch):
    monkeypatch.delenv("SETFLOW_DATA", raising=False)
    with pytest.raises(ValueError, match="'humanevil'"):
        load_task("humanevil")
    with pytest.raises(ValueError, match="data must be a folder"):
        load_task("additions", tmp_path / "no")
    with pytest.raises(ValueError, match="lacks.*test.jsonl|lacks.*train.jsonl"):
        load_task("gsm8k", tmp_path)
    with pytest.raises(ValueError, match="needs local data"):
        load_task("mbpp_all")


def test_gsm8k(data_folder, score):
    task = load_task("gsm8k", data_folder)
    assert len(task.eval_docs) == 1319
    right = score(task, lambda doc: doc["answer"], limit=200)
    assert right["exact_match,strict-match"] == 1.0 and right["exact_match,flexible-extract"] == 1.0
    wrong = score(load_task("gsm8k", data_folder), lambda doc: "It is 123456789.\n#### 123456789", limit=200)
    assert wrong["exact_match,strict-match"] == 0.0 and wrong["exact_match,flexible-extract"] == 0.0


@pytest.mark.slow
def test_all_of_gsm8k(data_folder, score):
    assert score(load_task("gsm8k", data_folder), lambda doc: doc["answer"])["exact_match,strict-match"] == 1.0
    wrong = score(load_task("gsm8k", data_folder), lambda doc: "#### 123456789")
    assert wrong["exact_match,strict-match"] == 0.0


def test_gsm8k_prompt_is_lm_evals(data_folder):
    task = load_task("gsm8k", data_folder)
    task.set_fewshot_seed(1234)
    doc = task.eval_docs[0]
    prompt = task.fewshot_context(doc, task.config.num_fewshot)
    assert prompt.count("Question:") == 6 and prompt.count("####") == 5
    assert prompt.endswith(f"Question: {doc['question']}\nAnswer:")
    assert task.config.generation_kwargs["until"] == ["Question:", "</s>", "<|im_end|>"]


def test_humaneval_on_a_few(consent, data_folder, score):
    assert score(load_task("humaneval", data_folder), solution, limit=10)["pass@1,create_test"] == 1.0
    assert score(load_task("humaneval", data_folder), lambda doc: "    pass\n", limit=10)["pass@1,create_test"] == 0.0
    instruct = load_task("humaneval_instruct", data_folder)
    fenced = score(instruct, lambda doc: solution(doc) + "```\nThat is it.", limit=10)
    assert fenced["pass@1,create_test"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus"])
def test_all_of_humaneval(name, consent, data_folder, score):
    task = load_task(name, data_folder)
    assert len(task.eval_docs) == 164
    assert score(task, solution)["pass@1,create_test"] == 1.0
    assert score(load_task(name, data_folder), lambda doc: "    pass\n")["pass@1,create_test"] == 0.0


@pytest.mark.parametrize(
    "number, helper, cheat",
    [
        (32, "poly", "    return 0\npoly = lambda xs, x: 0.0\n"),
        (38, "encode_cyclic", "    return s\nencode_cyclic = lambda s: s\n"),
        (50, "encode_shift", "    return s\ndef encode_shift(s): return s\n"),
    ],
)
def test_functions_of_a_prompt_are_not_for_the_completion_to_define(consent, data_folder, number, helper, cheat):
    """The tests of three problems use them besides the function that they test."""
    task = load_task("humaneval", data_folder)
    doc = task.eval_docs[number]
    target = task.doc_to_target(doc)
    assert f"def {helper}(" in target and target.endswith(f"{doc['test']}\ncheck({doc['entry_point']})")
    answers = [[doc["prompt"] + completion for completion in (doc["canonical_solution"], cheat)]]
    _, results = CodeEval().compute(references=[target], predictions=answers, k=[1], timeout=10)
    assert [outcome["passed"] for _, outcome in results[0]] == [True, False]


def test_tests_of_other_problems_stay_as_they_are(consent, data_folder):
    for name in ("humaneval", "humaneval_plus"):
        task = load_task(name, data_folder)
        changed = {
            number
            for number, doc in enumerate(task.eval_docs)
            if task.doc_to_target(doc) != f"{doc['test']}\ncheck({doc['entry_point']})"
        }
        assert changed == ({32, 38, 50} if name == "humaneval" else set())


def test_pass_at_k_over_repeats(consent, data_folder, score):
    result = score(load_task("humaneval_64", data_folder), solution, limit=1)
    assert {result[f"pass@{k},create_test"] for k in (2, 8, 16, 32, 64)} == {1.0}


def test_mbpp_is_the_hubs_test_split(consent, data_folder, score):
    task = load_task("mbpp", data_folder)
    assert [doc["task_id"] for doc in task.eval_docs] == list(range(11, 511))
    assert {k: len(v) for k, v in data.mbpp(data_folder).items()} == {
        "prompt": 10,
        "test": 500,
        "validation": 90,
        "train": 374,
    }
    doc = task.eval_docs[0]
    prompt = task.fewshot_context(doc, 3)
    assert prompt.count("[BEGIN]") == 4 and prompt.count("[DONE]") == 3
    assert prompt.endswith("\n".join(doc["test_list"]) + "\n[BEGIN]\n")
    assert score(task, solution, limit=10)["pass_at_1,none"] == 1.0
    assert score(load_task("mbpp", data_folder), lambda doc: "pass", limit=10)["pass_at_1,none"] == 0.0


def test_setup_code_runs_after_the_solution(consent, data_folder):
    """lm-eval's mbpp leaves it out, so that its problem 367 cannot be solved; mbpp_all has it."""
    both = {doc["task_id"]: doc for doc in load_task("mbpp_all", data_folder).eval_docs if doc["test_setup_code"]}
    assert set(both) == {367, 927}
    task, stock = load_task("mbpp_all", data_folder), load_task("mbpp", data_folder)
    for doc in both.values():
        assert task.process_results(doc, [doc["code"]])["pass_at_1"] == 1.0
    assert stock.process_results(both[367], [both[367]["code"]])["pass_at_1"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [("mbpp_all", 974), ("mbpp_sanitized", 257), ("mbpp_sanitized_all", 427)])
def test_all_of_mbpp(name, number, consent, data_folder, score):
    task = load_task(name, data_folder)
    assert len(task.eval_docs) == number
    assert score(task, solution)["pass_at_1,none"] == 1.0
    assert score(load_task(name, data_folder), lambda doc: "pass", limit=50)["pass_at_1,none"] == 0.0


def test_sanitized_problems_bring_their_imports_and_all_their_tests(data_folder):
    docs = data.mbpp_sanitized_all(data_folder)["test"]
    with_imports = next(doc for doc in docs if doc["test_imports"])
    assert mbpp_tests(with_imports).splitlines() == [*with_imports["test_imports"], *with_imports["test_list"]]
    assert any(len(mbpp_tests(doc).splitlines()) > 3 for doc in docs if not doc["test_imports"])


def test_mbpp_plus(consent, data_folder, score):
    """lm-eval's own task runs the base tests only; mbpp_plus_tests runs the additional ones."""
    stock, task = load_task("mbpp_plus", data_folder), load_task("mbpp_plus_tests", data_folder)
    assert len(stock.eval_docs) == len(task.eval_docs) == 378
    doc = task.eval_docs[0]
    base_tests_by_heart = """
def similar_elements(a, b):
    known = {((3, 4, 5, 6), (5, 7, 4, 10)): {4, 5}, ((1, 2, 3, 4), (5, 4, 3, 7)): {3, 4}}
    return known.get((a, b), {13, 14})
"""
    assert stock.process_results(doc, [base_tests_by_heart])["pass_at_1"] == 1.0
    assert task.process_results(doc, [base_tests_by_heart])["pass_at_1_plus"] == 0.0
    assert score(task, solution, limit=6)["pass_at_1_plus,none"] == 1.0


def test_additions(score):
    task = load_task("additions")
    assert len(task.eval_docs) == 500
    assert score(task, lambda doc: doc["answer"])["exact_match,none"] == 1.0
    assert score(load_task("additions"), lambda doc: f"{doc['a']} + {doc['b']} = 7\n")["exact_match,none"] == 0.0
    task.build_all_requests(limit=3)
    assert [i.args[0] for i in task.instances] == [doc["prompt"] for doc in task.eval_docs.select(range(3))]


def test_next_statement(score):
    task = load_task("next_statement")
    assert len(task.eval_docs) >= 100
    right = score(task, lambda doc: doc["answer"] + "    more = 1\n", limit=50)
    assert right["exact_match,none"] == 1.0 and right["compiles,none"] == 1.0
    wrong = score(load_task("next_statement"), lambda doc: "    )(\n", limit=50)
    assert wrong["exact_match,none"] == 0.0 and wrong["compiles,none"] == 0.0


def test_names_of_our_own_tasks_are_free():
    for name in OWN:
        with pytest.raises(ValueError, match=name):
            find_definition(name)
