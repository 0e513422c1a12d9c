"""Run a recipe: build model and data, train, measure, save."""

import json
import os
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from decoding import NextTokenObjective
from finetune.data import PackedDataset, read_texts
from finetune.objectives import METHODS
from finetune.recipe import Recipe
from finetune.trainer import ObjectiveTrainer


def finetune(recipe: Recipe) -> dict:
    """Train as ``recipe`` says, continuing from the last checkpoint in its output folder if there is one.

    Saves model and tokenizer (bf16 safetensors) and ``training.json`` with the losses, and returns what that file holds.
    """
    transformers.set_seed(recipe.training.get("seed", 42))
    tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or recipe.model)
    model = _build_model(recipe, tokenizer)
    method = METHODS[recipe.objective]
    objective = method.build(recipe.objective_options)
    method.prepare(objective, model, tokenizer)
    arguments = recipe.training_arguments()
    train = PackedDataset(
        read_texts(recipe.data), tokenizer, recipe.sequence_length, seed=arguments.data_seed or arguments.seed
    )
    held_out = {
        Path(path).stem.replace("-", "_"): PackedDataset(read_texts([path]), tokenizer, recipe.sequence_length)
        for path in recipe.held_out
    }
    if recipe.compile:
        model.get_decoder().compile()
    trainer = ObjectiveTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=held_out,
        objective=objective,
        evaluation_objective=NextTokenObjective(),
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(recipe.output) if Path(recipe.output).is_dir() else None)
    minutes = (time.perf_counter() - started) / 60
    losses = {name: trainer.evaluate(data, metric_key_prefix=name)[f"{name}_loss"] for name, data in held_out.items()}
    report = {
        "objective": repr(objective),
        "steps": trainer.state.global_step,
        "tokens_per_step": arguments.train_batch_size * arguments.gradient_accumulation_steps * recipe.sequence_length,
        "train_tokens": train.tokens.numel(),
        "minutes_of_last_run": round(minutes, 1),
        "machine": f"{os.cpu_count()} CPU cores" if arguments.device.type == "cpu" else torch.cuda.get_device_name(),
        "held_out_next_token_loss_nats": {name: round(loss, 4) for name, loss in losses.items()},
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    method.record(objective, model, tokenizer)
    if recipe.decoder is not None:
        model.generation_config.decoder = recipe.decoder
    # Else transformers takes the file for a copy of config.json when it loads it, and drops what that does not have.
    model.generation_config._from_model_config = False
    model.to(torch.bfloat16).save_pretrained(recipe.output)
    tokenizer.save_pretrained(recipe.output)
    (Path(recipe.output) / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _build_model(recipe: Recipe, tokenizer):
    if recipe.model is not None:
        return AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ids, **recipe.new_model))
