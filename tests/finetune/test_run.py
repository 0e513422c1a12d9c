"""Small runs of recipes: what is trained, what is saved, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune import finetune
from finetune.run import _command
from sbd import SetBlockDecoder


def test_a_set_block_run_saves_a_model_that_decodes(recipe, tmp_path):
    report = finetune(recipe(decoder="sbd:block_size=4"))
    assert report.steps == 4 and set(report.held_out_next_token_loss_nats) == {"texts"}
    assert {"ntp_loss", "matp_loss", "loss"} <= set(report.log[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    config = model.generation_config
    assert config.trained_block_sizes == list(range(2, 17)) and config.decoder == "sbd:block_size=4"
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, custom_generate=SetBlockDecoder(block_size=4))
    assert out.shape[1] <= 11 and config.mask_token_id not in out[0].tolist()


def test_training_lowers_the_loss(recipe):
    log = finetune(recipe(output="long", training={"max_steps": 40, "save_steps": 100})).log
    assert log[-1]["ntp_loss"] < 0.7 * log[0]["ntp_loss"]
    assert log[-1]["matp_loss"] < 0.8 * log[0]["matp_loss"]


@pytest.mark.parametrize(("objective", "kind"), [("ntp", "lora"), ("rpt", "full"), ("dfm", "full"), ("sbd", "gated")])
def test_a_cpu_trains_in_bf16_where_it_can(recipe, cpu, objective, kind, capsys):
    """Each method and each tuning; the losses are those of float32 within the digits of bf16."""
    tuning = {"kind": kind} | ({} if kind == "full" else {"rank": 2})
    changes = {"objective": objective, "tuning": tuning, "training": {"max_steps": 2, "bf16": True, "use_cpu": False}}
    report = finetune(recipe(**changes))
    assert report.dtype == ("bfloat16" if cpu.has_bf16 else "float32")
    assert capsys.readouterr().err.count("no bf16 instructions") == (not cpu.has_bf16)
    changes["training"]["bf16"] = False
    exact = finetune(recipe(output="exact", **changes))
    ours, theirs = ([entry["loss"] for entry in found.log] for found in (report, exact))
    assert (ours == theirs) is not cpu.has_bf16
    # Eight bits of mantissa, through one layer and a mean over some sixty targets.
    assert ours == pytest.approx(theirs, rel=2**-7)


@pytest.mark.parametrize("model", ["out/model", "./model", "some/deep/model", "tests/no-such-model"])
def test_a_missing_model_folder_is_named_without_asking_the_hub(recipe, monkeypatch, model):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(Path(__file__).parents[2])
    changed = dataclasses.replace(recipe(new_model=None, tokenizer=None, model=model), output="out/next")
    with pytest.raises(ValueError, match=f"model: the folder '{model}' does not exist"):
        finetune(changed)


def test_a_folder_without_a_model_is_named(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        finetune(recipe(new_model=None, tokenizer=None, model=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("program", "typed"),
    [("/any/finetune/__main__.py", "python -m finetune a.yaml"), ("/any/bin/setflow", "setflow a.yaml")],
)
def test_the_card_shows_what_was_typed(monkeypatch, program, typed):
    monkeypatch.setattr("sys.argv", [program, "a.yaml"])
    assert _command() == typed
