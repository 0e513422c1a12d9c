"""The ``training`` key of a recipe: which settings of transformers' Trainer these runs honour, and how they compute."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_torch_xla_available

from decoding.inputs.checks import check_count, check_type
from finetune.processes import note
from finetune.recipe_file import check_known

UNCOLLECTED = "has no effect: predictions are not collected, evaluation measures losses"
HUB = "has no effect: nothing is sent to the hub; upload the output folder when the run is finished"
COMPILED = "would compile around the objective; use the recipe's key compile"
COMMAND = "has no effect: what is done, and from which checkpoint, follows from the recipe and its output folder"
REFUSED = {
    "output_dir": "is the recipe's key output",
    "remove_unused_columns": "has no effect: rows have the columns that the objective needs",
    "label_smoothing_factor": "has no effect: the loss is that of the objective",
    "label_names": UNCOLLECTED,
    "prediction_loss_only": UNCOLLECTED,
    "include_for_metrics": UNCOLLECTED,
    "batch_eval_metrics": UNCOLLECTED,
    "eval_accumulation_steps": UNCOLLECTED,
    "eval_do_concat_batches": UNCOLLECTED,
    "eval_use_gather_object": UNCOLLECTED,
    "bf16_full_eval": "would round the weights at the first evaluation for good; bf16 evaluates in bf16, too",
    "fp16_full_eval": "would round the weights at the first evaluation for good; fp16 evaluates in fp16, too",
    "average_tokens_across_devices": "has no effect: the loss is always the mean over all processes",
    "logging_nan_inf_filter": "has no effect: a loss that is no number ends the run",
    "length_column_name": "has no effect: rows are of one length",
    "use_cache": "has no effect: training keeps no cache",
    "use_liger_kernel": "would bypass the objective by its own loss",
    "torch_compile": COMPILED,
    "torch_compile_backend": COMPILED,
    "torch_compile_mode": COMPILED,
    "auto_find_batch_size": "would count a broken step; lower per_device_train_batch_size",
    "save_only_model": "would leave checkpoints without an optimizer, from which a run goes on otherwise than it was",
    "enable_jit_checkpoint": "is not needed: SIGTERM and Ctrl-C save a checkpoint",
    "push_to_hub": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_token": HUB,
    "hub_private_repo": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "do_train": COMMAND,
    "do_eval": COMMAND,
    "do_predict": COMMAND,
    "resume_from_checkpoint": COMMAND,
}
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")
IN_BACKWARD = ("lomo", "adalomo")
BY_LENGTH = ("group_by_length", "batch_rebalance")
GATED_ONLY = (
    "cannot be combined with tuning.kind gated or selector, whose clean rows keep no activations anyway; lower "
    "per_device_train_batch_size or sequence_length instead"
)


def check_arguments(recipe) -> None:
    """Raise ValueError for a name or value under ``training`` that cannot work in a run of ``recipe``, or does nothing."""
    settings = recipe.training
    if not isinstance(settings, Mapping):
        raise ValueError(f"training must be a mapping of names to values, got {settings!r}")
    defaults = {field.name: _default(field) for field in dataclasses.fields(TrainingArguments)}
    for name, value in settings.items():
        check_known(f"training.{name}", name, defaults)
        if name in REFUSED and value != defaults[name]:
            raise ValueError(f"training.{name} {REFUSED[name]}")
    for field in dataclasses.fields(TrainingArguments):
        if field.name in settings and field.name not in ("max_steps", "seed", "data_seed", *COUNTS):
            check_type(f"training.{field.name}", settings[field.name], field.type)
    if recipe.tuning.kind in ("gated", "selector"):
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if settings.get(name):
                raise ValueError(f"training.{name} {GATED_ONLY}")
    steps = settings.get("max_steps", -1)
    if not isinstance(steps, int) or isinstance(steps, bool) or (steps < 1 and steps != -1):
        raise ValueError(f"training.max_steps must be a whole number of at least 1, or -1 for epochs, got {steps!r}")
    if steps > 0 and "num_train_epochs" in settings:
        raise ValueError("training.num_train_epochs has no effect beside training.max_steps; give max_steps=-1")
    for name in ("seed", "data_seed"):
        if settings.get(name) is not None:
            check_count(f"training.{name}", settings[name], 0, 2**32 - 1)
    for name in COUNTS:
        if name in settings:
            check_count(f"training.{name}", settings[name])
    if settings.get("train_sampling_strategy") in BY_LENGTH:
        raise ValueError(f"training.train_sampling_strategy {REFUSED['length_column_name']}")
    if settings.get("optim") in IN_BACKWARD:
        raise ValueError(f"training.optim {settings['optim']!r} takes its step before the loss of a step is weighed")
    if recipe.streaming and steps < 1:
        raise ValueError("streaming needs training.max_steps, since a stream has no length")
    if recipe.streaming and settings.get("dataloader_num_workers"):
        raise ValueError("training.dataloader_num_workers must be 0 with streaming: true, or rows come several times")
    if (_evaluates(settings) or settings.get("eval_on_start")) and not recipe.held_out_names:
        raise ValueError("training.eval_strategy needs held_out, on which it evaluates")
    best_metric(recipe)


def best_metric(recipe) -> str | None:
    """The figure by which a run tells which checkpoint is best; None if it does not ask for that.

    By default the loss on the held-out text, where there is one. Raises ValueError if it is not one that is measured.
    """
    settings = recipe.training
    asking = [name for name in ("load_best_model_at_end", "metric_for_best_model") if settings.get(name)]
    for name, value in (
        ("save_strategy", "best"),
        ("lr_scheduler_type", "reduce_lr_on_plateau"),
        ("lr_scheduler_type", "greedy"),
    ):
        if settings.get(name) == value:
            asking.append(name)
    if not asking:
        return None
    if not _evaluates(settings):
        raise ValueError(f"training.{asking[0]} needs training.eval_strategy")
    losses = [f"{name}_loss" for name in recipe.held_out_names]
    decoders = () if recipe.measure is None else recipe.measure.decoders
    known = [*losses, "objective_loss", *(f"tokens_per_forward/{spec}" for spec in decoders)]
    metric = settings.get("metric_for_best_model")
    if metric is None and len(losses) == 1:
        return losses[0]
    if not isinstance(metric, str) or metric.removeprefix("eval_") not in known:
        raise ValueError(f"training.metric_for_best_model must be one of {', '.join(known)}, got {metric!r}")
    return metric


def training_arguments(recipe) -> TrainingArguments:
    """What the Trainer gets. On a CPU without bf16 instructions a run in bf16 becomes one in float32, which is said.

    Raises ValueError for what transformers or the machine refuses.
    """
    settings = {"report_to": "none", **recipe.training}
    on_cpu = _runs_on_cpu(settings)
    if on_cpu:
        settings["use_cpu"] = True  # else transformers takes bf16 for a GPU's and refuses it
    if (metric := best_metric(recipe)) is not None:
        settings["metric_for_best_model"] = metric
    settings |= {name: "no" for name in STRATEGIES if settings.get(name) is False}  # what YAML makes of no
    settings |= {"output_dir": recipe.output, "remove_unused_columns": False}
    try:
        arguments = TrainingArguments(**settings)
        _try_out(arguments)
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    if on_cpu and arguments.mixed_precision == "bf16" and not cpu_has_bf16():  # by the recipe or by the launcher
        # Autocast would convert back and forth: 30 times slower than float32 on one CPU.
        note("bf16: this CPU has no bf16 instructions, so the run computes in float32")
        arguments.bf16 = False
        arguments.mixed_precision = "no"
    return arguments


def _try_out(arguments: TrainingArguments) -> None:
    """Make an optimizer and a schedule, so that what they refuse is known before anything is loaded."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    if arguments.optim_target_modules is None:  # else the optimizer looks for layers of a model
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if arguments.deepspeed is None:
            kind([parameter], **options)
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([parameter], lr=arguments.learning_rate),
        arguments.get_warmup_steps(max(1, arguments.max_steps)),
        max(1, arguments.max_steps),
        arguments.lr_scheduler_kwargs,
    )


def _evaluates(settings: Mapping[str, Any]) -> bool:
    return settings.get("eval_strategy", "no") not in ("no", False)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _runs_on_cpu(settings: Mapping[str, Any]) -> bool:
    told = settings.get("use_cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    return told or not (torch.accelerator.is_available() or is_torch_xla_available())


def cpu_has_bf16() -> bool:
    """Whether bf16 is quicker than float32 on this CPU; without instructions for it, it is many times slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
