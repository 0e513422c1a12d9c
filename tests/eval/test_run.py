"""From names of tasks to files of results."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")

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
    assert evaluation.folder is None


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(folder, tmp_path):
    command = [sys.executable, "-m", "eval", "--tasks", "additions", "--pretrained", str(folder), "--device", "cpu"]
    command += ["--output", str(tmp_path), "--limit", "10"]
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
