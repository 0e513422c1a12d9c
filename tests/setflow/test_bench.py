"""``setflow bench``: each command measures what it says, prints it, and keeps it in a file as it goes."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from eval.bench.contenders import Contender
from rpt import ResampleObjective, save_offset_code

LOSSLESS = "sbd-lossless:block_size=2"


@pytest.fixture(scope="module")
def folder(model_folder) -> str:
    return model_folder(max_position_embeddings=256)


@pytest.fixture
def bench(setflow, folder, tmp_path):
    """``bench("speed", ...)`` runs a command on three short texts; gives what was printed, and the file's contents."""
    prompts = tmp_path / "prompts.jsonl"
    texts = ["1 + 2 = 3, 4 + 5 = 9, " * 4, "37 + 45 = 82 " * 5, "8 + 9 = 17; " * 5]
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(command: str, *arguments: str, model: str = folder, expected: int = 0):
        shown = (command, "--model", model, "--out", str(tmp_path), "--name", "found")
        code, out, err = setflow("bench", *shown, *(a.format(prompts=prompts) for a in arguments))
        assert code == expected, err
        return out, json.loads((tmp_path / "found.json").read_text())

    return run


def test_quality(bench):
    out, file = bench("quality", "--prompts", "{prompts}", "--decoder", "ntp", "--decoder", LOSSLESS)
    assert [row["decoder"] for row in file["rows"]] == ["ntp", LOSSLESS] and "unfinished" not in file
    assert file["rows"][0]["tokens_per_forward"] == 1 and file["rows"][0]["count"] == 3
    assert file["command"].startswith("setflow") and file["conditions"]["dtype"] == "float32"
    assert f"decoder={LOSSLESS}" in out and "written to" in out


def test_what_was_measured_before_ctrl_c_is_kept(bench, monkeypatch):
    run = Contender.run

    def interrupted(self, *arguments, **settings):
        if self.name == LOSSLESS:
            raise KeyboardInterrupt
        return run(self, *arguments, **settings)

    monkeypatch.setattr(Contender, "run", interrupted)
    specs = ("--decoder", "ntp", "--decoder", LOSSLESS)
    out, file = bench("quality", "--prompts", "{prompts}", *specs, expected=130)
    assert [row["decoder"] for row in file["rows"]] == ["ntp"] and file["unfinished"] is True
    assert "written to" not in out


def test_lossless(bench):
    _, file = bench("lossless", "--prompts", "{prompts}", "--decoder", LOSSLESS)
    assert [(row["batch_size"], row["different"]) for row in file["rows"]] == [(1, 0), (8, 0)]


def test_speed(bench):
    _, file = bench("speed", "--prompts", "{prompts}", "--count", "1", "--rounds", "1", "--decoder", LOSSLESS)
    stock, ours, lookup = file["rows"]
    assert (stock["decoder"], ours["decoder"]) == ("model.generate", LOSSLESS) and "lookup" in lookup["decoder"]
    assert stock["speed_up"] == 1 and stock["tokens_per_forward"] == 1
    assert ours["tokens_per_second"] > 0 and ours["speed_up"] > 0


def test_resample(bench, folder, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    ResampleObjective(prev_target="ntp").prepare(model)
    model.generation_config.trained_block_sizes, model.generation_config._from_model_config = [2], False
    model.save_pretrained(trained)
    save_offset_code(model, trained)
    texts = ("--prompts", "{prompts}", "--texts", "{prompts}", "--control", folder)
    sizes = ("--block-size", "2", "--exact", "2")
    sampled = ("--temperature", "1", "--seeds", "2", "--decoder", "rpt:iterations=0.5")
    _, file = bench("resample", *texts, *sizes, *sampled, model=str(trained))
    likelihood, samples, *rest = file["rows"]
    assert likelihood["documents"] == 3 and likelihood["exact_tokens"] == 2 and likelihood["control_loss"] > 0
    assert samples["seeds"] == 2 and samples["changes_per_token"] > 0
    points, table = [row for row in rest if "decoder" in row], [row for row in rest if "family" in row]
    assert len(points) + len(table) == len(rest)
    assert {row["family"] for row in table} == {"NTP", "RPT", "SBD", "SBD + RPT", "SBD + re-masking"}
    assert all(row["temperature"] == 0 for row in points)


def test_training(bench):
    _, file = bench("training", "--batch-size", "1", "--length", "16", "--rounds", "1", "--rank", "2")
    assert [row["objective"] for row in file["rows"]] == ["ntp", "sbd", "sbd gated"]
    assert file["rows"][0]["times_ntp"] == 1 and file["conditions"]["attention"] == "sdpa_tiles"


def test_memory(setflow, tmp_path):
    code, _, err = setflow("bench", "memory", "--decoder", "ntp", "--new-tokens", "4", "--out", str(tmp_path))
    assert code == 0, err
    stock, ours = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert (stock["decoder"], ours["decoder"]) == ("generate", "ntp") and stock["relative_to_generate"] == 1
    assert 0.5 < ours["relative_to_generate"] < 2
