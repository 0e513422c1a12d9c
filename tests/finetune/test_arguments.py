"""Settings of the Trainer: what does nothing or cannot work is said when a recipe is read; the rest does what it says."""

import dataclasses

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

from finetune import finetune, load_recipe
from finetune.arguments import REFUSED
from finetune.run import Run
from finetune.trainer import ObjectiveTrainer

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
FILE = {"full": "model.safetensors", "lora": "trained.safetensors", "gated": "trained.safetensors"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect: the loss is that of the objective"),
        ({"label_names": ["x"]}, "label_names has no effect: predictions are not collected"),
        ({"output_dir": "elsewhere"}, "output_dir is the recipe's key output"),
        ({"remove_unused_columns": False}, "remove_unused_columns has no effect"),
        ({"bf16_full_eval": True}, "bf16_full_eval would round the weights"),
        ({"save_only_model": True}, "save_only_model would leave checkpoints without an optimizer"),
        ({"torch_compile": True}, "torch_compile .*use the recipe's key compile"),
        ({"push_to_hub": True}, "push_to_hub has no effect: nothing is sent to the hub"),
        ({"resume_from_checkpoint": "out/checkpoint-2"}, "resume_from_checkpoint has no effect"),
        ({"do_predict": True}, "do_predict has no effect"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy has no effect: rows are of one length",
        ),
        ({"num_train_epochs": 2}, "num_train_epochs has no effect beside training.max_steps"),
        ({"max_steps": -2}, "max_steps must be a whole number of at least 1, or -1 for epochs, got -2"),
        ({"max_steps": 0}, "max_steps must be .* got 0"),
        ({"max_steps": "ten"}, "max_steps must be .* got 'ten'"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number of at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number of at least 1"),
        ({"optim": "lomo"}, "optim 'lomo' takes its step before"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs training.eval_strategy"),
        ({"save_strategy": "best"}, "save_strategy needs training.eval_strategy"),
        (
            {"metric_for_best_model": "loss", **EVALUATED},
            "metric_for_best_model must be one of texts_loss, .*got 'loss'",
        ),
        ({"metric_for_best_model": "tokens_per_forward/ntp", **EVALUATED}, "metric_for_best_model must be one of"),
        ([1, 2], r"must be a mapping .* got \[1, 2\]"),
    ],
)
def test_what_cannot_work_is_said_when_the_recipe_is_read(recipe_path, settings, message):
    path = recipe_path()
    values = yaml.safe_load(path.read_text())
    values["training"] = values["training"] | settings if isinstance(settings, dict) else settings
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"^training.?{message}"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": [], "training": EVALUATED}, "training.eval_strategy needs held_out"),
        ({"held_out": [], "training": {"eval_on_start": True}}, "training.eval_strategy needs held_out"),
        ({"held_out": [], "measure": {"rows": 1}}, "measure needs held_out"),
        (
            {"streaming": True, "training": {"dataloader_num_workers": 1}},
            "dataloader_num_workers must be 0 with streaming",
        ),
        ({"streaming": True, "training": {"max_steps": -1}}, "streaming needs training.max_steps"),
        (
            {"tuning": {"kind": "gated"}, "training": {"activation_checkpointing": True}},
            "activation_checkpointing cannot be combined with tuning.kind gated",
        ),
    ],
)
def test_what_other_keys_rule_out_is_said_then_too(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine_with_min_lr"},  # lacks its least rate
        {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"nonsense": 1}},
        {"lr_scheduler_type": "zigzag"},
        {"optim": "adam_of_mine"},
        {"optim": "adamw_bnb_8bit", "optim_args": "nonsense"},
        {"learning_rate": "high"},
        {"learning_rate": -1.0},
        {"warmup_steps": -3},
        {"eval_strategy": "sometimes"},
    ],
)
def test_what_transformers_refuses_is_said_before_anything_is_loaded(recipe, monkeypatch, settings):
    monkeypatch.setattr("finetune.run.load_tokenizer", lambda *arguments, **named: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"^training(: |\.).") as refusal:
        finetune(recipe(training=settings))
    assert "\n" not in str(refusal.value)


def test_defaults_may_be_written_out(recipe):
    """A recipe may name a setting that would be refused, as long as it says what is so anyway."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert REFUSED.keys() <= defaults.keys()
    values = {name: defaults[name] for name in REFUSED if defaults[name] is not dataclasses.MISSING}
    arguments = recipe(training={**values, "save_strategy": False, "eval_strategy": False}).training_arguments()
    assert arguments.save_strategy == arguments.eval_strategy == "no"


@pytest.mark.parametrize(("kind", "metric"), [("full", None), ("lora", "eval_texts_loss"), ("gated", "objective_loss")])
def test_the_best_checkpoint_is_what_is_saved(recipe, tmp_path, monkeypatch, kind, metric):
    """Where figures get worse after the second step the weights of that are saved, in a run started again, too."""
    evaluate = ObjectiveTrainer.evaluate

    def worse(self, *arguments, **settings):
        return {name: value + self.state.global_step for name, value in evaluate(self, *arguments, **settings).items()}

    monkeypatch.setattr(ObjectiveTrainer, "evaluate", worse)
    save, saved = Run._save_weights, []

    def look(self, *arguments):
        saved.append({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})
        save(self, *arguments)

    monkeypatch.setattr(Run, "_save_weights", look)
    training = {"load_best_model_at_end": True, "save_total_limit": 1, "max_grad_norm": 0.1, **EVALUATED}
    training |= {"metric_for_best_model": metric} if metric else {}
    tuning = {"kind": kind} | ({} if kind == "full" else {"rank": 2})
    chosen = recipe(training=training, tuning=tuning)
    for _ in "ab":
        report = finetune(chosen)
        assert report.steps == 4 and report.best_checkpoint == "checkpoint-2"
        for name in ("manifest.json", "training.json"):
            (tmp_path / "out" / name).unlink()
    best = load_file(tmp_path / "out" / "checkpoint-2" / FILE[kind])
    for weights in saved:
        assert len(saved) == 2 and weights.keys() <= best.keys()
        torch.testing.assert_close(weights, {name: best[name] for name in weights})
