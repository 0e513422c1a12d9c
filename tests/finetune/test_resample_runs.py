"""Runs of the real trainer with the previous-token objective, alone and together with set blocks."""

import pytest
import torch
from safetensors import safe_open

from decoding import decoder_from_spec
from finetune import finetune
from finetune.both import SetBlockResampleObjective
from rpt import ResampleConfig
from setflow.loading import load_model
from tests.conftest import VOCAB


@pytest.fixture
def run(recipe, tmp_path):
    """``run(objective, options, **changes)``: three steps on a tiny Llama; the output folder."""

    def go(objective: str, options: dict, output: str = "out", training: dict | None = None, **changes):
        training = {"max_steps": 3, "per_device_train_batch_size": 4} | (training or {})
        chosen = recipe(output, training=training, objective=objective, objective_options=options, **changes)
        return finetune(chosen), str(tmp_path / output)

    return go


OPTIONS = {"sequence_share": 1.0, "window_share": 0.2, "rope_index": "token"}


def test_a_run_saves_the_code_beside_the_model_and_one_call_loads_both(run):
    report, folder = run("rpt", OPTIONS, decoder="rpt:iterations=1")
    assert {"ntp_loss", "ptp_loss", "skip_loss"} <= set(report.log[0])
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "offset" in key]
    model, _ = load_model(folder, torch.float32)
    assert ResampleConfig.from_config(model.config) == ResampleConfig(**OPTIONS)
    table = model.offset_code.table[0]
    assert table[0].any() and table[3].any() and not table[1:3].any()  # offsets -1 and 2; 0 and 1 are never used
    decoder = decoder_from_spec(model.generation_config.decoder)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, custom_generate=decoder).shape[1] <= 11


def test_a_second_stage_goes_on_with_the_code(run):
    _, first = run("rpt", OPTIONS)
    before = load_model(first)[0].offset_code.table
    training = {"max_steps": 1, "learning_rate": 0.0}
    _, second = run("rpt", OPTIONS, "second", new_model=None, model=first, training=training)
    assert torch.equal(load_model(second)[0].offset_code.table, before)
    _, third = run("rpt", OPTIONS, "third", new_model=None, model=first)
    assert not torch.equal(load_model(third)[0].offset_code.table, before)  # what was loaded is trained again


def test_another_objective_leaves_the_code_as_it_is(run, tmp_path):
    _, first = run("rpt", OPTIONS)
    before = load_model(first)[0].offset_code.table
    _, second = run("ntp", {}, "second", new_model=None, model=first)
    with safe_open(f"{second}/model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "offset" in key]
    model, _ = load_model(second)
    assert torch.equal(model.offset_code.table, before)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, custom_generate=decoder_from_spec("rpt")).any()


def test_both_objectives_in_one_run(run):
    report, folder = run("sbd+rpt", {"resample": OPTIONS, "set_block": {"block_sizes": [4]}})
    assert {"ntp_loss", "ptp_loss", "matp_loss"} <= set(report.log[0])
    model, _ = load_model(folder, torch.float32)
    for spec in ("sbd:block_size=4,revise=resample,accept=gibbs", "rpt:iterations=0.5", "sbd-lossless:block_size=4"):
        out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, custom_generate=decoder_from_spec(spec))
        assert out.shape[1] <= 11


def test_sequences_are_shared_between_the_objectives(fresh_model):
    """Their losses are weighed by their labels; a share that is no whole number of sequences is met on average."""
    model = fresh_model("llama")
    both = SetBlockResampleObjective(0.4, {"block_sizes": [4]}, {"sequence_share": 1.0, "window_share": 0.2})
    both.resample_objective.prepare(model)
    tokens = torch.randint(3, VOCAB - 1, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "document_ids": torch.zeros(2, 24, dtype=torch.long)}
    with_windows = []
    for seed in range(60):
        torch.manual_seed(seed)
        _, metrics = both(model, batch)
        with_windows.append("ptp_loss" in metrics)
    assert 0.8 - 0.25 < sum(with_windows) / 60 < 0.8 + 0.2  # one of two sequences with probability 0.8
    for share, objective in ((1.0, both.resample_objective), (0.0, both.set_block_objective)):
        alone = SetBlockResampleObjective(share, both.set_block, both.resample)
        torch.manual_seed(1)
        torch.rand(())  # the coin
        expected, metrics = objective(model, batch)
        torch.manual_seed(1)
        loss, found = alone(model, batch)
        assert torch.allclose(loss, expected) and found["num_targets"] == metrics["num_targets"]


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("rpt", {"windw": 3}, "objective_options.*windw"),
        ("rpt", {"window": 1}, "window must be"),
        ("sbd+rpt", {"resample": {"code_at": "head"}}, "code_at must be one of"),
        ("sbd+rpt", {"resample_share": 2}, "resample_share"),
    ],
)
def test_mistakes_are_named(run, objective, options, message):
    with pytest.raises(ValueError, match=message):
        run(objective, options)
