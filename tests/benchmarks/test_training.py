"""The table of options and the cost of a step: every run once, figures from the runs themselves."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.command import main
from benchmarks.training import ablation, shapes
from benchmarks.training.ablation import (
    DECIDING,
    DEFAULTS,
    OF_TUNING,
    VARIANTS,
    Variant,
    as_markdown,
    run_variants,
)
from benchmarks.training.step_cost import contenders, measure_steps, share_of_peak, step_cost
from decoding.forward.adapter import LINEAR_LAYERS, gated_adapter
from finetune import TrainingReport
from finetune.tuning import Tuning

REPORT = TrainingReport(
    objective="SetBlockObjective()",
    tuning="Tuning()",
    steps=7,
    tokens_per_step=64,
    train_tokens=640,
    minutes_of_last_run=0.1,
    machine="1 CPU core",
    dtype="float32",
    command="setflow finetune",
    measured={
        "acceptance_0": 0.5,
        "acceptance_1": 0.3,
        "matp_loss": 2.0,
        "expected_tau": 1.75,
        "tokens_per_forward/ntp": 1.0,
    }
    | {"tokens_per_forward/sbd-lossless:block_size=8": 1.5},
    held_out_before={"own": 1.25},
    held_out_next_token_loss_nats={"own": 1.26},
    log=[],
)


@pytest.fixture
def started(monkeypatch):
    """The recipes that were run; a finished run is left as it is, as ``finetune`` does."""
    recipes = []

    def run(recipe):
        folder = Path(recipe.output)
        if not folder.is_dir():
            recipes.append(recipe)
            folder.mkdir(parents=True)
        return REPORT

    monkeypatch.setattr(ablation, "finetune", run)
    return recipes


def test_each_variant_changes_one_option_and_runs_once(recipe, started):
    told, chosen = [], recipe(decoder="sbd-lossless:block_size=8")
    rows = run_variants(chosen, 7, seeds=2, told=told.append)
    assert rows == told and [row["options"] for row in rows] == [Variant(changes).name for changes in VARIANTS]
    runs = [(changes, seed) for changes in VARIANTS for seed in ((1, 2) if changes in DECIDING else (1,))]
    assert len(started) == len(runs) == len({run.output for run in started})
    for (changes, seed), run in zip(runs, started, strict=True):
        wanted = DEFAULTS | changes
        rank, over, targets = wanted.pop("rank"), wanted.pop("alpha_over_rank"), wanted.pop("targets")
        names = LINEAR_LAYERS if targets == "all" else (targets,)
        assert run.tuning == Tuning("gated", rank, rank * over, targets=names)
        assert run.objective_options == wanted
        assert run.training["max_steps"] == 7 and run.training["seed"] == seed
        run.build_objective()
    assert started[0].measure.decoders[1:3] == tuple(f"{chosen.decoder},candidates={n}" for n in (0, 4))
    assert run_variants(chosen, 7, seeds=2) == rows and len(started) == len(runs)
    run_variants(chosen, 8, seeds=2)
    assert len(started) == 2 * len(runs)


def test_adapters_have_no_place_where_all_weights_are_trained(recipe, started):
    run_variants(recipe(decoder="sbd-lossless:block_size=8"), 7, "full")
    assert len(started) == sum(not changes.keys() & set(OF_TUNING) for changes in VARIANTS)
    assert all(chosen.tuning.kind == "full" for chosen in started)


def test_the_table_holds_the_figures(recipe, started):
    table = as_markdown(run_variants(recipe(decoder="sbd-lossless:block_size=8"), 7), "title")
    assert "| defaults | 1 | 1.50 | 0.00 | 1.75 | 0.400 | 1.260 |" in table
    assert table.count("\n| ") == 1 + len(VARIANTS)


def test_steps_take_turns_and_leave_the_model_alone(fresh_model):
    model = fresh_model("llama")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    chosen = list(contenders(model, 4, 2))
    batch = {"input_ids": torch.randint(3, 90, (2, 24)), "document_ids": torch.zeros(2, 24, dtype=torch.long)}
    rows = measure_steps(chosen, batch, 2)
    assert [row["objective"] for row in rows] == ["ntp", "sbd", "sbd gated"] and rows[0]["times_ntp"] == 1
    assert all(len(contender.seconds) == 3 for contender in chosen)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    gated = chosen[2].model
    assert all(torch.equal(weight, before[name]) for name, weight in gated.state_dict().items() if name in before)
    assert any(parameter.any() for name, parameter in gated_adapter(gated).named_parameters() if name.endswith("up"))
    assert not torch.equal(chosen[1].model.lm_head.weight, before["lm_head.weight"])


def test_share_of_peak():
    """6 operations for each weight and token, and attention, as in PaLM's appendix B."""
    row = {"objective": "ntp", "tokens_per_second": 1000}
    flops = 6 * 7.5e9 + 12 * 32 * 4096 * 512 / 2  # 8.03 billion weights, less 0.53 of the embedding
    found = share_of_peak(row, "NVIDIA H200", "meta-llama/Llama-3.1-8B", 8, 32, 512)
    assert found == pytest.approx(flops * 1000 / 989e12, rel=0.01)
    gated = share_of_peak(row | {"objective": "sbd gated"}, "NVIDIA H200", "meta-llama/Llama-3.1-8B", 8, 32, 512)
    full = share_of_peak(row | {"objective": "sbd"}, "NVIDIA H200", "meta-llama/Llama-3.1-8B", 8, 32, 512)
    assert gated < found < full  # as many operations on layers as next-token training, half of the rows meet the head
    assert share_of_peak(row, "Tesla T4", "meta-llama/Llama-3.1-8B", 8, 32, 512) is None


def test_the_command_of_the_steps(model_folder, tmp_path, capfd):
    shown = ("--model", model_folder(max_position_embeddings=256), "--out", str(tmp_path), "--name", "found")
    sizes = ("--batch-size", "1", "--length", "16", "--rounds", "1", "--rank", "2")
    assert main(step_cost, "training.step_cost", (*shown, *sizes)) == 0
    file = json.loads((tmp_path / "found.json").read_text())
    assert [row["objective"] for row in file["rows"]] == ["ntp", "sbd", "sbd gated"]
    assert file["rows"][0]["times_ntp"] == 1 and file["conditions"]["attention"] == "sdpa_tiles"


def test_the_command_of_the_table(started, tmp_path, data, capfd):
    out = tmp_path / "results"
    given = ("--model", "somewhere", "--data", str(data), "--work", str(tmp_path / "work"), "--steps", "7")
    assert main(ablation.ablation, "training.ablation", (*given, "--out", str(out))) == 0
    file = json.loads((out / "training-options.json").read_text())
    assert len(file["rows"]) == len(VARIANTS) and file["settings"]["steps"] == 7 and "unfinished" not in file
    assert (out / "training-options.md").read_text().count("\n| ") == 1 + len(VARIANTS)


def test_recipes_run_on_a_shape_in_measured_memory(tmp_path, monkeypatch, capsys):
    """On a small shape and in this process, where libraries take more memory than the model, so no amount is asked for."""

    def here(command: str, *arguments: str) -> dict:
        return {"train": shapes.train, "decode": shapes.decode}[command](*arguments)

    monkeypatch.setattr(shapes, "in_process", here)
    assert {"llama3.1-8b-full", "dfm-qwen3-8b", "rpt-llama3.1-8b", "qwen3-8b-gated"} <= {*shapes.eight_billion()}
    arguments = ["--shape", "embedded", "--recipe", "qwen3-8b-gated", "--length", "32"]
    places = ["--out", str(tmp_path), "--folder", str(tmp_path / "models")]
    assert shapes.main(shapes.shapes, "training.shapes", [*arguments, *places]) == 0
    rows = json.loads((tmp_path / "shapes-8b.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["training"] + ["decoding"] * 5 and len(rows[0]["losses"]) == 2
    assert all(row["new_tokens"] == 32 for row in rows[1:]) and rows[0]["estimated_bytes"] > 0
    assert not list((tmp_path / "models").glob("*-gated")), "what was trained is removed"
    monkeypatch.setattr(shapes, "free_memory", lambda: 1024.0)
    (row,) = shapes.measure("qwen3-8b-gated", 32, "adafactor", "embedded", tmp_path / "models")
    assert row["skipped"] == "only 0 GB of memory are free"
