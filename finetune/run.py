"""Run a recipe: build model and data, train, measure, save."""

import dataclasses
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from decoding import NextTokenObjective, Objective, find_mask_token
from decoding.forward.adapter import gated_adapter
from decoding.forward.loading import load_config, load_tokenizer, load_weights, one_sentence
from decoding.forward.rope import context_length
from decoding.training.new_mask_token import initialise_mask_token
from finetune.card import write_card
from finetune.checkpoints import read_json, write_json
from finetune.interrupts import SaveOnInterrupt, full_disk_named
from finetune.measure import Measure
from finetune.packing import EndlessRows, PackedDataset, StreamedRows
from finetune.processes import on_first_process
from finetune.recipe import Recipe
from finetune.recipe_file import check_sources
from finetune.report import TrainingReport
from finetune.resume import Progress, find_progress, finish
from finetune.split import read_data
from finetune.trainer import ObjectiveTrainer
from finetune.tuning import merge_adapter
from sbd.selector import draft_selector

BEFORE_FILE = "before.json"


def finetune(recipe: Recipe) -> TrainingReport:
    """Train as ``recipe`` says, continuing from the last whole checkpoint in its output folder if there is one.

    A run that is finished is left as it is.

    Saves the model or its adapter, the tokenizer, the report as ``training.json`` and, with ``measure``, a model card.
    Raises ValueError for what the user can mend, and KeyboardInterrupt after Ctrl-C, when a checkpoint is saved.
    """
    check_sources(recipe.model, recipe.tokenizer, recipe.output)
    arguments = recipe.training_arguments()
    progress = on_first_process(lambda: find_progress(recipe, arguments.max_steps))
    if progress.report is not None:
        return progress.report
    run = Run.build(recipe, arguments)
    before, minutes = run.train(progress)
    report = run.report(progress, before, minutes)
    run.save(report)
    return report


@dataclass(frozen=True)
class Run:
    """A recipe and what is made of it: built, trained, measured and saved, in this order."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    objective: Objective
    trainer: ObjectiveTrainer
    train_rows: PackedDataset | StreamedRows
    held_out: dict[str, PackedDataset]

    @classmethod
    def build(cls, recipe: Recipe, arguments: TrainingArguments) -> "Run":
        """Read the data, load the model and make it ready to train."""
        transformers.set_seed(arguments.seed)
        tokenizer = load_tokenizer(recipe.tokenizer or recipe.model, field="tokenizer" if recipe.tokenizer else "model")
        config = _config(recipe, tokenizer)
        context = context_length(config)
        if context is not None and recipe.sequence_length > context:
            raise ValueError(
                f"sequence_length must be from 1 to {context}, the context of the model, got {recipe.sequence_length}"
            )
        train_rows, held_out = read_data(recipe, tokenizer, arguments.data_seed or arguments.seed)
        model = _load_model(recipe, config, arguments)
        model.set_attn_implementation(recipe.attention_on(arguments.device, model.config))
        objective = recipe.build_objective()
        recipe.tuning.freeze(model)
        recipe.tuning.add_gated_adapter(model)
        objective.prepare(model, tokenizer)
        if recipe.mask_init != "mean":
            initialise_mask_token(model, find_mask_token(model), recipe.mask_init)
        recipe.tuning.add_lora(model, objective)
        if recipe.compile:
            model.get_decoder().compile()
        measure = recipe.measure or Measure()
        measured = [data[i] for data in held_out.values() for i in range(min(len(data), measure.rows))]
        trainer = ObjectiveTrainer(
            model,
            arguments,
            train_dataset=EndlessRows(train_rows) if recipe.streaming else train_rows,
            eval_dataset=held_out,
            objective=objective,
            evaluation_objective=NextTokenObjective(),
            measure=lambda model: measure(model, objective, measured),
        )
        return cls(recipe, tokenizer, model, objective, trainer, train_rows, held_out)

    def train(self, progress: Progress) -> tuple[dict[str, dict[str, float]], float]:
        """The figures before training, where they are asked for, and the minutes that it took."""
        interrupt = SaveOnInterrupt(self.trainer.accelerator)
        self.trainer.add_callback(interrupt)
        with full_disk_named(self.recipe.output), interrupt.listening():
            if self.trainer.is_world_process_zero():
                progress.keep(self.recipe)
            before = {} if self.recipe.measure is None else self._before(progress)
            started = time.perf_counter()
            self.trainer.train(resume_from_checkpoint=progress.checkpoint)
        return before, (time.perf_counter() - started) / 60

    def report(self, progress: Progress, before: dict[str, dict[str, float]], minutes: float) -> TrainingReport:
        """Measure what was trained."""
        recipe, trainer, arguments = self.recipe, self.trainer, self.trainer.args
        batches = arguments.gradient_accumulation_steps * arguments.world_size
        best = trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None
        return TrainingReport(
            objective=repr(self.objective),
            tuning=repr(recipe.tuning),
            steps=trainer.state.global_step,
            tokens_per_step=arguments.train_batch_size * batches * recipe.sequence_length,
            train_tokens=None if recipe.streaming else self.train_rows.num_tokens,
            minutes_of_last_run=round(minutes, 1),
            machine=_machine(arguments),
            dtype="bfloat16" if arguments.mixed_precision == "bf16" else "float32",
            command=_command(),
            **before,
            held_out_next_token_loss_nats=_held_out_losses(trainer, self.held_out),
            measured={} if recipe.measure is None else trainer.measured(),
            log=[entry for entry in trainer.state.log_history if "loss" in entry],
            best_checkpoint=None if best is None else Path(best).name,
            changed_files=progress.changed_files or None,
        )

    def save(self, report: TrainingReport) -> None:
        """Write the model or its adapter, what belongs to it, and the report, all or nothing of which counts."""
        recipe, model, trainer, folder = self.recipe, self.model, self.trainer, Path(self.recipe.output)
        self.objective.record(model)
        if recipe.decoder is not None:
            model.generation_config.decoder = recipe.decoder
        # Else transformers takes the file for a copy of config.json when it loads it, and drops what that does not have.
        model.generation_config._from_model_config = False
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what FSDP or ZeRO has cut up
        if trainer.is_world_process_zero():
            with full_disk_named(recipe.output):
                self.tokenizer.save_pretrained(folder)  # before the model, since merging an adapter copies it
                self._save_weights(weights, folder)
                if recipe.measure is not None:
                    write_card(recipe, self.objective.tags, report, folder)
                finish(folder, report)
        trainer.accelerator.wait_for_everyone()

    def _before(self, progress: Progress) -> dict[str, dict[str, float]]:
        """The same figures of the model that training starts from; kept in a file for a run that goes on.

        They are measured again where other text is held out, or something else is measured, than when they were kept.
        """
        path, asked = Path(self.recipe.output) / BEFORE_FILE, dataclasses.asdict(self.recipe)
        measured = json.loads(json.dumps([asked["held_out"], asked["measure"], progress.files]))
        kept = on_first_process(lambda: read_json(path))
        if kept is not None and kept.get("of") == measured:
            return kept["figures"]
        losses = _held_out_losses(self.trainer, self.held_out)
        figures = {"held_out_before": losses, "measured_before": self.trainer.measured()}
        if self.trainer.is_world_process_zero():
            write_json(path, {"of": measured, "figures": figures})
        return figures

    def _save_weights(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        model, tuning, dtype = self.model, self.recipe.tuning, getattr(torch, self.recipe.save_dtype)
        if tuning.kind == "selector":
            draft_selector(model).save(model, folder, base=self.recipe.model)
            return
        extra = self.objective.extra_files(model, weights)
        for name, content in extra.items():
            (folder / name).write_bytes(content)
        if tuning.kind == "gated":
            gated_adapter(model).save(model, folder, dtype)
            return
        model.config.dtype = dtype
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        model.to(dtype).save_pretrained(folder, state_dict=weights)
        if tuning.kind == "lora":
            model.generation_config.save_pretrained(folder)
        if tuning.merge:
            merge_adapter(folder, folder / "merged", dtype)
            for name, content in extra.items():
                (folder / "merged" / name).write_bytes(content)


def _held_out_losses(trainer: ObjectiveTrainer, held_out: dict[str, PackedDataset]) -> dict[str, float]:
    losses = {name: trainer.evaluate(data, metric_key_prefix=name)[f"{name}_loss"] for name, data in held_out.items()}
    return {name: round(loss, 4) for name, loss in losses.items()}


def _command() -> str:
    """What the user typed."""
    program = Path(sys.argv[0])
    started = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*started, *sys.argv[1:]])


def _machine(arguments: TrainingArguments) -> str:
    if arguments.device.type == "cpu":
        return f"{os.cpu_count()} CPU cores"
    count = arguments.world_size
    return ("" if count == 1 else f"{count} x ") + torch.cuda.get_device_name()


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    if recipe.model is not None:
        return load_config(recipe.model)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")}
    with one_sentence("new_model", "made"):
        return LlamaConfig(vocab_size=len(tokenizer), **ids, **recipe.new_model)


def _load_model(recipe: Recipe, config: PretrainedConfig, arguments: TrainingArguments) -> PreTrainedModel:
    if recipe.model is not None:
        # Frozen weights need no more digits than they are computed with; those that are trained do.
        frozen = recipe.tuning.kind != "full" and arguments.mixed_precision == "bf16"
        model = load_weights(recipe.model, dtype=torch.bfloat16 if frozen else torch.float32)
        if gated_adapter(model) is not None and recipe.tuning.kind != "selector":
            raise ValueError(
                f"model: {recipe.model!r} is a gated adapter, from which no training starts; give its base model, "
                f"{model.name_or_path!r}"
            )
        return model
    with one_sentence("new_model", "made"):
        return LlamaForCausalLM(config)
