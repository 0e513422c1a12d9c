"""The trainer: one loss however a step is cut up, and runs that end early and go on."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune import TrainingReport, finetune
from finetune.checkpoints import last_checkpoint
from finetune.interrupts import full_disk_named
from finetune.trainer import ObjectiveTrainer

# Whole masks of one size are not drawn at random, so that runs cut up differently see the same.
FIXED = {"block_sizes": [4], "all_mask_share": 1.0}


def losses(report: TrainingReport) -> list[float]:
    return [entry["loss"] for entry in report.log]


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture
def uneven(monkeypatch):
    """Micro-batches with different numbers of targets: the first half of every second row is not to be learned."""
    from finetune.packing import PackedDataset

    original = PackedDataset.__getitem__

    def item(self, index):
        row = original(self, index)
        row["loss_mask"] = torch.arange(len(row["input_ids"])) >= (16 if index % 2 else 0)
        return row

    monkeypatch.setattr(PackedDataset, "__getitem__", item)


@pytest.mark.parametrize("objective", ["ntp", "sbd"])
def test_accumulation_changes_nothing(recipe, tmp_path, uneven, objective):
    options = FIXED if objective == "sbd" else {}
    reports = [
        finetune(
            recipe(
                output=f"out-{micro}",
                objective=objective,
                objective_options=options,
                training={"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro},
            )
        )
        for micro in (4, 1)
    ]
    assert losses(reports[1]) == pytest.approx(losses(reports[0]), rel=1e-5)
    norms = [[entry["grad_norm"] for entry in report.log] for report in reports]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert reports[0].tokens_per_step == reports[1].tokens_per_step == 4 * 32


def test_two_processes_are_one(recipe, recipe_path, tmp_path):
    """Data-parallel training synchronises its gradients: the same losses and weights as one process."""
    one = finetune(recipe(output="one", objective_options=FIXED, training={"per_device_train_batch_size": 4}))
    path = recipe_path(output="two", objective_options=FIXED, training={"per_device_train_batch_size": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "-m", "finetune", str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    two = TrainingReport.read(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert two.tokens_per_step == one.tokens_per_step
    other = weights(tmp_path / "one")
    for name, weight in weights(tmp_path / "two").items():
        torch.testing.assert_close(weight, other[name], rtol=2e-2, atol=1e-3)  # saved in bf16


def test_masks_of_rate_zero_leave_the_next_token_loss(recipe, monkeypatch):
    from sbd import SetBlockObjective

    monkeypatch.setattr(SetBlockObjective, "draw_masks", lambda self, blocks: blocks.start < 0)
    first = losses(finetune(recipe(output="sbd")))
    assert first == pytest.approx(losses(finetune(recipe(output="ntp", objective="ntp"))), rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_run_resumes_with_the_same_losses(recipe, monkeypatch, accumulation):
    """Also in the second epoch, in its middle."""
    training = {"max_steps": 30, "save_steps": 26, "gradient_accumulation_steps": accumulation}
    whole = losses(finetune(recipe(output="whole", training=training)))

    class Killed(Exception):
        pass

    original = ObjectiveTrainer.training_step

    def dies(self, *arguments, **settings):
        if self.state.global_step == 28:
            raise Killed
        return original(self, *arguments, **settings)

    monkeypatch.setattr(ObjectiveTrainer, "training_step", dies)
    with pytest.raises(Killed):
        finetune(recipe(output="killed", training=training))
    monkeypatch.setattr(ObjectiveTrainer, "training_step", original)
    assert losses(finetune(recipe(output="killed", training=training))) == pytest.approx(whole, rel=1e-5)


def test_interrupt_saves_and_the_same_run_goes_on(recipe, monkeypatch, tmp_path):
    whole = losses(finetune(recipe(output="whole")))
    original = ObjectiveTrainer.training_step

    def interrupted(self, *arguments, **settings):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(ObjectiveTrainer, "training_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(output="stopped"))
    assert signal.getsignal(signal.SIGINT) is before
    assert last_checkpoint(tmp_path / "stopped").endswith("checkpoint-3")
    monkeypatch.setattr(ObjectiveTrainer, "training_step", original)
    assert losses(finetune(recipe(output="stopped"))) == pytest.approx(whole, rel=1e-5)


def test_checkpoints_of_another_recipe_are_not_gone_on_from(recipe):
    finetune(recipe())
    with pytest.raises(ValueError, match="another run: objective was 'sbd' and is 'ntp'.*remove the folder"):
        finetune(recipe(objective="ntp"))
    report = finetune(recipe(training={"max_steps": 5, "per_device_train_batch_size": 1}))
    assert report.steps == 5, "more steps and other batches are the same run"


def test_a_loss_that_is_no_number_ends_the_run(recipe):
    with pytest.raises(ValueError, match="loss is nan at step [23].*learning_rate"):
        finetune(recipe(training={"learning_rate": 1e30, "max_grad_norm": 0.0}))


def test_a_full_disk_is_named():
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ):
        with pytest.raises(ValueError, match="'some/folder' is full"):
            with full_disk_named("some/folder"):
                raise error
    with pytest.raises(RuntimeError, match="other"):
        with full_disk_named("some/folder"):
            raise RuntimeError("other")
