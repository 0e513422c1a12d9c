"""The same command given again: after the end, after a change of settings or files, after the numbers went wrong."""

import dataclasses
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune import TrainingReport, finetune
from finetune.card import write_card
from finetune.checkpoints import MANIFEST_FILE, last_checkpoint
from finetune.trainer import ObjectiveTrainer

MEASURE = {"rows": 1, "block_size": 2}


def losses(report: TrainingReport) -> list[float]:
    return [entry["loss"] for entry in report.log]


def rates(report: TrainingReport) -> list[float]:
    return [entry["learning_rate"] for entry in report.log]


@pytest.fixture
def states(tmp_path):
    """What every file in the output folder holds, and when it was written."""
    return lambda: {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*") if p.is_file()}


class Killed(BaseException):
    pass


@pytest.fixture
def killed_before(monkeypatch):
    """``killed_before(step, recipe)``: run that recipe until it is killed."""

    def run(step: int, recipe) -> None:
        original = ObjectiveTrainer.training_step

        def dies(self, *arguments, **settings):
            if self.state.global_step == step - 1:
                raise Killed
            return original(self, *arguments, **settings)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(ObjectiveTrainer, "training_step", dies)
            finetune(recipe)

    return run


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 3, "save_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.3}, {"max_steps": 3, "save_steps": 9}],
)
def test_a_finished_run_is_left_as_it_is(recipe, states, capsys, length):
    """However its length is given, and wherever in an epoch or between two checkpoints it ends."""
    first = finetune(recipe(training=length))
    before = states()
    capsys.readouterr()
    assert finetune(recipe(training=length)) == first
    assert states() == before
    said = capsys.readouterr().err
    assert f"finished after {first.steps} steps, nothing is left to do" in said and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["full", "gated"])
def test_after_its_last_step_a_killed_run_takes_no_other(recipe, tmp_path, kind):
    settings = {"tuning": {"kind": kind} | ({"rank": 2} if kind == "gated" else {}), "training": {"max_steps": 3}}
    first = finetune(recipe(**settings))
    weights = {
        name: w.clone() for path in (tmp_path / "out").glob("*.safetensors") for name, w in load_file(path).items()
    }
    for name in (MANIFEST_FILE, "training.json"):
        (tmp_path / "out" / name).unlink()
    again = finetune(recipe(**settings))
    assert again.steps == 3 and again.log == first.log
    assert again.held_out_next_token_loss_nats == first.held_out_next_token_loss_nats
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, weight in load_file(path).items():
            assert torch.equal(weight, weights[name])


def test_a_longer_run_goes_on_as_if_it_had_always_been_that_long(recipe, capsys):
    """The learning rate, too, is that of the longer schedule."""
    training = {"max_steps": 8, "lr_scheduler_type": "linear"}
    whole = finetune(recipe("whole", training=training))
    finetune(recipe(training=training | {"max_steps": 4}))
    capsys.readouterr()
    longer = finetune(recipe(training=training))
    assert "training.max_steps was 4 and is 8" in capsys.readouterr().err
    assert longer.steps == 8 and rates(longer)[4:] == rates(whole)[4:]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate was 0.01 and is 0.001"),
        ({"training": {"weight_decay": 0.1}}, "training.weight_decay was not given and is 0.1"),
        ({"attention": "sdpa"}, "attention was None and is 'sdpa'"),
    ],
)
def test_a_change_that_comes_too_late_is_named(recipe, states, change, named):
    finetune(recipe())
    before = states()
    with pytest.raises(
        ValueError, match=f"finished after 4 steps, so this comes too late: {named}.*larger training.max_st"
    ):
        finetune(recipe(**change))
    assert states() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"decoder": "sbd:block_size=4"}, "decoder was None and is 'sbd:block_size=4'"),
        ({"save_dtype": "float32"}, "save_dtype was 'bfloat16' and is 'float32'"),
        ({"measure": MEASURE}, "measure.rows was not given and is 1"),
    ],
)
def test_what_is_measured_and_saved_may_change_after_the_end(recipe, capsys, change, named):
    first = finetune(recipe())
    capsys.readouterr()
    second = finetune(recipe(**change))
    assert re.search(named, capsys.readouterr().err)
    assert second.steps == 4 and second.log == first.log
    assert (second.measured_before is not None) == ("measure" in change)
    assert finetune(recipe(**change)) == second, "and then it is finished again"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"seed": 4}}, "training.seed was 3 and is 4"),
        ({"training": {"optim": "sgd"}}, "training.optim was not given and is 'sgd'"),
        ({"objective_options": {"block_sizes": [2]}}, r"objective_options.block_sizes was not given and is \[2\]"),
        ({"held_out": 0.1}, "held_out was .* and is 0.1"),
        ({"held_out": []}, r"held_out was \[.*\] and is \[\]"),
    ],
)
def test_another_run_is_refused(recipe, states, killed_before, change, named):
    killed_before(4, recipe())
    before = states()
    with pytest.raises(ValueError, match=f"holds checkpoints of another run: {named}"):
        finetune(recipe(**change))
    assert states() == before


def test_a_finished_run_without_its_checkpoints_is_not_started_anew(recipe, tmp_path):
    finetune(recipe())
    for path in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(path)
    assert finetune(recipe()).steps == 4
    with pytest.raises(
        ValueError, match="finished after 4 steps and its checkpoints are gone.*training.max_steps was 4"
    ):
        finetune(recipe(training={"max_steps": 8}))


@pytest.mark.parametrize(
    ("change", "group"),
    [({"learning_rate": 1e-3}, ("initial_lr", 1e-3)), ({"weight_decay": 0.1}, ("weight_decay", 0.1))],
)
def test_a_run_that_goes_on_takes_the_settings_it_is_given(recipe, killed_before, monkeypatch, capsys, change, group):
    """And not those that the optimizer and the scheduler of the checkpoint remember."""
    killed_before(4, recipe(training={"lr_scheduler_type": "linear"}))
    seen = []
    step = ObjectiveTrainer.training_step

    def look(self, *arguments, **settings):
        seen.append((self.optimizer.param_groups[0][group[0]], self.optimizer.param_groups[0]["lr"]))
        return step(self, *arguments, **settings)

    monkeypatch.setattr(ObjectiveTrainer, "training_step", look)
    report = finetune(recipe(training={"lr_scheduler_type": "linear"} | change))
    rate = change.get("learning_rate", 1e-2)
    assert rates(report)[2:] == pytest.approx([rate * 2 / 4, rate * 1 / 4])
    assert seen == [(group[1], rate) for rate in rates(report)[2:]]
    assert f"training.{[*change][0]} was" in capsys.readouterr().err


class Poison(TrainerCallback):
    """Put a value that is no number somewhere, right before the second step is taken."""

    def __init__(self, where: str):
        self.where = where

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 2:
            parameter = [p for p in model.parameters() if p.grad is not None][-1]
            if self.where == "gradient":
                parameter.grad.fill_(torch.nan)
            elif self.where == "weight":
                parameter.data.view(-1)[0] = torch.inf
            else:  # a square that overflows stops its weight for ever, while every loss stays a number
                optimizer.state[parameter]["exp_avg_sq"].view(-1)[0] = torch.inf


@pytest.mark.parametrize(
    ("kind", "where"),
    [("full", "gradient"), ("full", "square"), ("lora", "weight"), ("gated", "gradient"), ("gated", "square")],
)
def test_what_is_no_number_is_never_saved(recipe, monkeypatch, tmp_path, kind, where):
    """The last good checkpoint stays, though only one is kept, and a lower rate goes on from it."""
    tuning = {"kind": kind} | ({} if kind == "full" else {"rank": 2})
    training = {"save_steps": 1, "save_total_limit": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    original = ObjectiveTrainer.__init__

    def poisoned(self, *arguments, **settings):
        original(self, *arguments, **settings)
        self.add_callback(Poison(where))

    with monkeypatch.context() as patch:
        patch.setattr(ObjectiveTrainer, "__init__", poisoned)
        message = "no longer finite after step 3: lower training.learning_rate.*goes on from the last of them"
        with pytest.raises(ValueError, match=message):
            finetune(recipe(tuning=tuning, training=training))
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    report = finetune(recipe(tuning=tuning, training=training | {"learning_rate": 1e-3}))
    assert report.steps == 4 and rates(report)[2:] == [1e-3, 1e-3]


def test_a_run_without_checkpoints_does_not_save_what_is_no_number(recipe, tmp_path):
    with pytest.raises(ValueError, match="no longer finite|loss is nan"):
        finetune(recipe(training={"save_strategy": "no", "max_steps": 1, "learning_rate": 1e300, "max_grad_norm": 0.0}))
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def based(recipe, fresh_model, tokenizer, tmp_path):
    """``based(kind, ...)``: a recipe that starts from a saved model."""
    fresh_model("llama", initializer_range=0.1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def make(kind: str = "gated", **changes):
        tuning = {"kind": kind} | ({} if kind == "full" else {"rank": 2})
        return recipe(
            **{"new_model": None, "tokenizer": None, "model": str(tmp_path / "base"), "tuning": tuning} | changes
        )

    return make


def _data(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(path.read_text().replace("cat", "cow"))
    return path


def _held_out(tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text('{"text": "the cow ate the grass, and the dog ate the bone."}\n' * 4)
    return path


def _weights(tmp_path):
    path = tmp_path / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the last digit of the last weight
    path.write_bytes(content)
    return path


def _tokenizer(tmp_path):
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    return path


@pytest.mark.parametrize("change", [_data, _weights, _tokenizer])
def test_files_that_changed_are_named(based, killed_before, tmp_path, capsys, change):
    (tmp_path / "held.jsonl").write_text('{"text": "the cat ate the bread and then the corn, which was bad."}\n' * 4)
    held_out = [str(tmp_path / "held.jsonl")]
    killed_before(4, based(held_out=held_out, measure=MEASURE))
    path = change(tmp_path)
    with pytest.raises(
        ValueError, match=rf"files changed since .*{path.name}' \([\d,]+ bytes then.*accept_changed_files=tr"
    ):
        finetune(based(held_out=held_out, measure=MEASURE))
    report = finetune(based(held_out=held_out, measure=MEASURE, accept_changed_files=True))
    assert f"goes on with changed files: {path}" in capsys.readouterr().err
    assert report.steps == 4 and report.changed_files == {"checkpoint-2": [str(path)]}
    assert report.held_out_before == report.held_out_next_token_loss_nats, "measured on the same text"
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"From checkpoint-2 on these files were not what they were before: {path}" in card
    assert "is that of the base model" in card


@pytest.mark.parametrize(("held_out", "change"), [(0.2, _data), (["held.jsonl"], _held_out)])
def test_what_was_trained_on_is_not_held_out(based, killed_before, tmp_path, monkeypatch, held_out, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.jsonl").write_text('{"text": "the cat ate the bread and then the corn, which was bad."}\n' * 4)
    killed_before(4, based("full", held_out=held_out))
    name = change(tmp_path).name
    for accept in (False, True):
        with pytest.raises(
            ValueError, match=f"{name}.*to go on is impossible, since what is held out now may have been"
        ):
            finetune(based("full", held_out=held_out, accept_changed_files=accept))


def test_the_card_says_what_was_measured(based, tmp_path):
    chosen = based(measure=MEASURE)
    report = finetune(chosen)
    for before, said in (
        (report.held_out_before, True),
        ({"texts": 9.0}, False),
        ({"other": 9.0}, False),
        ({}, False),
    ):
        write_card(chosen, (), dataclasses.replace(report, held_out_before=before), tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("is that of the base model to the last digit shown" in card) == said
        assert "bit for bit" not in card and ("differs" in card) == (before == {"texts": 9.0})
