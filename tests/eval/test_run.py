"""From names of tasks to files of results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")

from datasets import Dataset

from eval.model import SetflowLM
from eval.run import evaluate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(shared_model, tokenizer, tmp_path_factory):
    """A tiny random model on disk, with room for the tasks' answers."""
    path = tmp_path_factory.mktemp("model")
    shared_model("llama", max_position_embeddings=1024).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_results_and_costs_are_written_side_by_side(folder, tmp_path):
    arguments = {"pretrained": str(folder), "decoder": "sbd-lossless:block_size=4", "batch_size": 2, "device": "cpu"}
    evaluation = evaluate(["additions", "next_statement"], arguments, output=tmp_path, limit=3)
    assert len(evaluation.samples) == 6
    assert {s["task"] for s in evaluation.samples} == {"additions", "next_statement"}
    (results,) = evaluation.folder.glob("results_*.json")
    written = json.loads(results.read_text())
    assert set(written["results"]) == {"additions", "next_statement"}
    assert written["config"]["decoder"].startswith("SelfSpeculativeDecoder(block_size=4")
    assert written["config"]["model_args"]["pretrained"] == str(folder)
    (costs,) = evaluation.folder.glob("decoding_2*.json")
    decoding = json.loads(costs.read_text())
    assert decoding["total"] == written["config"]["decoding"]
    assert decoding["total"]["tokens"] == sum(task["tokens"] for task in decoding["tasks"].values())
    assert costs.name.removeprefix("decoding_") == results.name.removeprefix("results_")
    (samples,) = evaluation.folder.glob("decoding_samples_*.jsonl")
    assert [json.loads(line)["tokens"] for line in samples.read_text().splitlines()] == [
        sample["tokens"] for sample in evaluation.samples
    ]
    assert len(list(evaluation.folder.glob("samples_*.jsonl"))) == 2
    assert "tokens per forward" in evaluation.table() and "additions" in evaluation.table()

    again = evaluate(["additions"], arguments, output=tmp_path, limit=4)
    assert len((tmp_path / "finished.jsonl").read_text().splitlines()) == 7
    assert again.samples[:3] == evaluation.samples[:3]


@pytest.mark.parametrize("name", ["additions", "next_statement", "gsm8k", "humaneval", "mbpp", "arc_like"])
def test_every_sample_is_that_of_hf(name, folder, data_folder, consent):
    """lm-eval's own model and ours with next-token decoding: same prompts, answers and scores."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from eval.tasks import load_task

    def task() -> ConfigurableTask:
        return ConfigurableTask(config=multiple_choice()) if name == "arc_like" else load_task(name, data_folder)

    def samples(model) -> list[dict]:
        results = lm_eval.evaluate(
            model,
            TaskManager(include_defaults=False).load([prepared(task())]),
            limit=3,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )
        (of_task,) = results["samples"].values()
        return [
            {key: sample[key] for key in ("doc_id", "arguments", "resps", *sample["metrics"])} for sample in of_task
        ]

    def prepared(task: ConfigurableTask) -> ConfigurableTask:
        task.set_fewshot_seed(1234)
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": 16}, update=True)
        return task

    stock = samples(HFLM(pretrained=str(folder), device="cpu", batch_size=1))
    ours = samples(SetflowLM(pretrained=str(folder), decoder="ntp", device="cpu", batch_size=2))
    assert len(ours) >= 3 and ours == stock


def multiple_choice() -> dict:
    """A task by log-likelihood, as ARC's are."""
    docs = [{"question": f"{i} + {i} = ", "choices": [str(2 * i), str(i), "x"], "gold": 0} for i in range(5)]
    return {
        "task": "arc_like",
        "dataset_path": "tests:arc_like",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def test_a_cap_on_new_tokens_leaves_smaller_wishes_alone(folder, monkeypatch):
    wishes = {}

    def answer(self, requests, disable_tqdm=False):
        wishes.update({request.task_name: request.args[1]["max_gen_toks"] for request in requests})
        return ["x"] * len(requests)

    monkeypatch.setattr(SetflowLM, "generate_until", answer)
    evaluate(["additions", "next_statement"], {"pretrained": str(folder), "device": "cpu"}, limit=1, max_gen_toks=70)
    assert wishes == {"additions": 70, "next_statement": 64}


def test_code_tasks_need_consent_before_a_model_is_loaded(monkeypatch, data_folder):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match="confirm-run-unsafe-code"):
        evaluate(["humaneval"], {"pretrained": "no/such/model"}, data=data_folder)


def test_code_tasks_run_in_the_sandbox(folder, data_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    arguments = {"pretrained": str(folder), "device": "cpu", "max_length": 2048}
    evaluation = evaluate(
        ["humaneval"],
        arguments,
        data=data_folder,
        limit=2,
        gen_kwargs={"max_gen_toks": 8},
        confirm_run_unsafe_code=True,
    )
    assert evaluation.results["results"]["humaneval"]["pass@1,create_test"] == 0.0
    assert evaluation.decoding["sandbox"].startswith(("namespaces", "without"))
    assert f"generated code ran in a sandbox: {evaluation.decoding['sandbox']}" in evaluation.table()
    assert evaluation.folder is None


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(folder, tmp_path):
    command = [sys.executable, "-m", "setflow", "eval", "--tasks", "additions", "--model", str(folder)]
    command += ["--device", "cpu", "--decoder", "ntp", "--out", str(tmp_path), "--limit", "10"]
    finished = tmp_path / "finished.jsonl"

    def lines() -> list[dict]:
        return [json.loads(line) for line in finished.read_text().splitlines()] if finished.exists() else []

    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(lines()) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = lines()
    assert 2 <= len(before) < 10
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tokens per forward" in done.stdout and "additions" in done.stdout
    after = lines()
    assert after[: len(before)] == before and len({line["key"] for line in after}) == len(after) == 10


@pytest.mark.slow  # lm-eval looks through all its tasks first
def test_lm_evals_command_line_knows_the_model(folder, tmp_path):
    """``python -m eval`` is lm-eval's own, with our model and decoders in --model_args."""
    rows = [{"question": "ab", "answer": "c"}] * 2
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""")
    command = [sys.executable, "-m", "eval", "run", "--model", "setflow", "--tasks", "tiny", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},decoder=sbd-lossless:block_size=4,finished={tmp_path}/f.jsonl"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["decoding"]["tokens"] == 12
    assert len((tmp_path / "f.jsonl").read_text().splitlines()) == 2
