"""Run a recipe: build model and data, train, measure, save."""

import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from decoding import NextTokenObjective, Objective, find_mask_token
from decoding.forward.adapter import gated_adapter
from decoding.forward.rope import context_length
from decoding.inputs.loading import load_tokenizer, load_weights
from decoding.training.new_mask_token import initialise_mask_token
from finetune.card import write_card
from finetune.checkpoints import read_json, write_json
from finetune.interrupts import SaveOnInterrupt, full_disk_named
from finetune.objectives import build_objective
from finetune.packing import EndlessRows, PackedDataset
from finetune.processes import on_first_process
from finetune.recipe import Recipe
from finetune.recipe_file import check_sources
from finetune.resume import Progress, find_progress, finish
from finetune.split import read_data
from finetune.trainer import ObjectiveTrainer
from finetune.tuning import merge_adapter

BEFORE_FILE = "before.json"


def finetune(recipe: Recipe) -> dict:
    """Train as ``recipe`` says, continuing from the last whole checkpoint in its output folder if there is one.

    A run that is finished is left as it is.

    Saves the model or its adapter, the tokenizer, ``training.json`` with the losses and a model card, and returns what
    that file holds. Raises ValueError for what the user can mend, and KeyboardInterrupt after Ctrl-C, when a checkpoint
    is saved.
    """
    check_sources(recipe.model, recipe.tokenizer, recipe.output)
    folder = Path(recipe.output)
    arguments = recipe.training_arguments()
    progress = on_first_process(lambda: find_progress(recipe, arguments.max_steps))
    if progress.report is not None:
        return progress.report
    transformers.set_seed(arguments.seed)
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model, field="tokenizer" if recipe.tokenizer else "model")
    train, held_out = read_data(recipe, tokenizer, arguments.data_seed or arguments.seed)
    model = _build_model(recipe, tokenizer, arguments)
    context = context_length(model.config)
    if context is not None and recipe.sequence_length > context:
        raise ValueError(
            f"sequence_length must be from 1 to {context}, the context of the model, got {recipe.sequence_length}"
        )
    model.set_attn_implementation(recipe.attention_on(arguments.device, model.config))
    tuned = recipe.tuned
    objective = tuned.fit(build_objective(recipe.objective, recipe.objective_options))
    tuned.freeze(model)
    tuned.add_gated_adapter(model)
    objective.prepare(model, tokenizer)
    if recipe.mask_init != "mean":
        initialise_mask_token(model, find_mask_token(model), recipe.mask_init)
    tuned.add_lora(model, objective)
    if recipe.compile:
        model.get_decoder().compile()
    rows = [row for data in held_out.values() for row in (data[i] for i in range(min(len(data), recipe.measured.rows)))]
    trainer = ObjectiveTrainer(
        model,
        arguments,
        train_dataset=EndlessRows(train) if recipe.streaming else train,
        eval_dataset=held_out,
        objective=objective,
        evaluation_objective=NextTokenObjective(),
        measure=lambda model: recipe.measured(model, objective, rows),
    )
    interrupt = SaveOnInterrupt(trainer.accelerator)
    trainer.add_callback(interrupt)
    with full_disk_named(recipe.output), interrupt.listening():
        if trainer.is_world_process_zero():
            progress.keep(recipe)
        before = _before(trainer, held_out, recipe, progress) if recipe.measure else {}
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=progress.checkpoint)
    minutes = (time.perf_counter() - started) / 60
    tokens_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    report = {
        "objective": repr(objective),
        "tuning": repr(tuned),
        "steps": trainer.state.global_step,
        "tokens_per_step": tokens_per_step * recipe.sequence_length,
        "train_tokens": None if recipe.streaming else train.num_tokens,
        "minutes_of_last_run": round(minutes, 1),
        "machine": _machine(arguments),
        "dtype": "bfloat16" if arguments.mixed_precision == "bf16" else "float32",
        "command": _command(),
        **before,
        "held_out_next_token_loss_nats": _held_out_losses(trainer, held_out),
        "measured": trainer.measured() if recipe.measure else {},
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if arguments.load_best_model_at_end:
        report["best_checkpoint"] = Path(trainer.state.best_model_checkpoint).name
    if progress.changed_files:
        report["changed_files"] = progress.changed_files
    objective.record(model)
    if recipe.decoder is not None:
        model.generation_config.decoder = recipe.decoder
    # Else transformers takes the file for a copy of config.json when it loads it, and drops what that does not have.
    model.generation_config._from_model_config = False
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what FSDP or ZeRO has cut up
    if trainer.is_world_process_zero():
        with full_disk_named(recipe.output):
            tokenizer.save_pretrained(folder)  # before the model, since merging an adapter copies it
            _save(recipe, objective, model, weights, folder)
            if recipe.measure:
                write_card(recipe, objective.tags, report, folder)
            finish(folder, report)
    trainer.accelerator.wait_for_everyone()
    return report


def _before(trainer: ObjectiveTrainer, held_out: dict, recipe: Recipe, progress: Progress) -> dict:
    """The same figures of the model that training starts from; kept in a file for a run that goes on.

    They are measured again where other text is held out, or something else is measured, than when they were kept.
    """
    path = Path(recipe.output) / BEFORE_FILE
    measured = json.loads(json.dumps([recipe.held_out, recipe.measure, progress.files]))
    kept = on_first_process(lambda: read_json(path))
    if kept is not None and kept.get("of") == measured:
        return kept["figures"]
    figures = {"held_out_before": _held_out_losses(trainer, held_out), "measured_before": trainer.measured()}
    if trainer.is_world_process_zero():
        write_json(path, {"of": measured, "figures": figures})
    return figures


def _held_out_losses(trainer: ObjectiveTrainer, held_out: dict[str, PackedDataset]) -> dict[str, float]:
    losses = {name: trainer.evaluate(data, metric_key_prefix=name)[f"{name}_loss"] for name, data in held_out.items()}
    return {name: round(loss, 4) for name, loss in losses.items()}


def _save(recipe: Recipe, objective: Objective, model, weights: dict[str, torch.Tensor], folder: Path) -> None:
    dtype, extra = getattr(torch, recipe.save_dtype), objective.extra_files(model, weights)
    for name, content in extra.items():
        (folder / name).write_bytes(content)
    if recipe.tuned.kind == "gated":
        gated_adapter(model).save(model, folder, dtype)
        return
    model.config.dtype = dtype
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    model.to(dtype).save_pretrained(folder, state_dict=weights)
    if recipe.tuned.merge:
        model.generation_config.save_pretrained(folder)
        merge_adapter(folder, folder / "merged", dtype)
        for name, content in extra.items():
            (folder / "merged" / name).write_bytes(content)
    elif recipe.tuned.kind == "lora":
        model.generation_config.save_pretrained(folder)


def _command() -> str:
    """What the user typed."""
    program = Path(sys.argv[0])
    started = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*started, *sys.argv[1:]])


def _machine(arguments) -> str:
    if arguments.device.type == "cpu":
        return f"{os.cpu_count()} CPU cores"
    count = arguments.world_size
    return ("" if count == 1 else f"{count} x ") + torch.cuda.get_device_name()


def _build_model(recipe: Recipe, tokenizer, arguments):
    if recipe.model is not None:
        # Frozen weights need no more digits than they are computed with; those that are trained do.
        frozen = recipe.tuned.kind != "full" and arguments.mixed_precision == "bf16"
        model = load_weights(recipe.model, dtype=torch.bfloat16 if frozen else torch.float32)
        if gated_adapter(model) is not None:
            raise ValueError(
                f"model: {recipe.model!r} is a gated adapter, from which no training starts; give its base model, "
                f"{model.name_or_path!r}"
            )
        return model
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **recipe.new_model))
