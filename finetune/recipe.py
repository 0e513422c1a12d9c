"""Recipes: what to train, on what, and how, as one YAML file with typed and checked keys."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from transformers import PretrainedConfig, TrainingArguments

from decoding import Objective, decoder_from_spec
from decoding.forward import tiles
from decoding.inputs.checks import check_choice, check_count, check_range, check_type
from decoding.training.new_mask_token import MASK_INITS
from finetune.arguments import check_arguments, training_arguments
from finetune.measure import Measure
from finetune.objectives import build_objective, check_objective
from finetune.recipe_file import check_known, find_recipe, read_recipe
from finetune.sources import Source, reported_names
from finetune.tuning import Tuning

DTYPES = ("bfloat16", "float32")
ATTENTION = ("sdpa", tiles.NAME, "flex_attention")
FLEX_HEADS = 16  # the smallest head width that FlexAttention's kernels take


@dataclass(frozen=True)
class Recipe:
    """One training run. Raises ValueError for a key or a value that makes no sense, with the nearest known name.

    output: folder for checkpoints and, at the end, the model.
    data: sources, mixed in proportion to their length. In a file each is a path, a hub name, or a mapping with the
        fields of ``finetune.sources.Source``. What a record may look like is in ``finetune.documents.Encoder``.
    held_out: sources on which losses are measured, each reported under its file name; or a share of ``data``, such as
        0.02, that is kept from training. A held-out text is not trained on, wherever else it stands in ``data``.
    model: folder or hub name of the model to start from; absent if ``new_model`` is given.
    new_model: keyword arguments of LlamaConfig for a model trained from scratch, with ``tokenizer``.
    tokenizer: folder or hub name; by default the model's own.
    objective: a name in ``finetune.objectives.OBJECTIVES``, such as "ntp" or "sbd", or "module:Class" of one's own.
    objective_options: the fields of that objective.
    tuning: what is trained, in a file the fields of ``finetune.tuning.Tuning``; by default all weights.
    mask_init: what a new mask token's embedding starts from: "mean" of all rows, or "random".
    sequence_length: tokens in a packed row.
    streaming: read the data while training instead of before, in another order in each epoch; needs training.max_steps.
    decoder: decoder spec that the model is saved with as its default.
    measure: what is measured on ``held_out`` at each evaluation and for the model card, in a file the fields of
        ``finetune.measure.Measure``.
    attention: "sdpa", or what skips the keys that no row of a tile sees: "flex_attention", the default on a GPU, or
        "sdpa_tiles", the default on a CPU.
    compile: compile the trunk (torch.compile), which pays on runs of more than a few minutes.
    save_dtype: "bfloat16" or "float32", of the saved weights.
    accept_changed_files: go on although data, or the model or tokenizer that the run started from, are no longer what they
        were when it started.
    training: keyword arguments of transformers' TrainingArguments; those that do nothing here are refused.
    """

    output: str
    data: tuple[Source, ...]
    objective: str
    held_out: tuple[Source, ...] | float = ()
    model: str | None = None
    new_model: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    tuning: Tuning = field(default_factory=Tuning)
    mask_init: str = "mean"
    sequence_length: int = 512
    streaming: bool = False
    decoder: str | None = None
    measure: Measure | None = None
    attention: str | None = None
    compile: bool = False
    save_dtype: str = "bfloat16"
    accept_changed_files: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, kind in get_type_hints(Recipe).items():
            check_type(name, getattr(self, name), kind)
        check_objective(self.objective)
        check_choice("mask_init", self.mask_init, MASK_INITS)
        check_choice("save_dtype", self.save_dtype, DTYPES)
        check_choice("attention", self.attention, (None, *ATTENTION))
        check_count("sequence_length", self.sequence_length, 2)
        if (self.model is None) == (self.new_model is None):
            raise ValueError(
                "give either model (a folder or hub name) or new_model (a LlamaConfig), not both or neither"
            )
        if self.new_model is not None and self.tokenizer is None:
            raise ValueError("tokenizer is needed with new_model: a folder or hub name")
        if self.decoder is not None:
            decoder_from_spec(self.decoder)
        if isinstance(self.held_out, float | int):
            check_range("held_out", self.held_out, 0, 1, include_low=False, include_high=False)
        _check_sizes("objective_options", self.objective_options, self.sequence_length)
        if self.measure is not None:
            _check_sizes("measure", {"block_size": self.measure.block_size}, self.sequence_length)
        self.build_objective()  # raises for what makes no sense
        if self.tuning.kind in ("gated", "selector") and self.compile:
            raise ValueError(f"compile cannot be combined with tuning.kind {self.tuning.kind}")
        if self.tuning.kind == "selector" and (self.decoder is not None or self.model is None):
            raise ValueError("tuning.kind selector needs a model, and keeps the decoder of that; leave decoder out")
        if self.streaming and isinstance(self.held_out, float):
            raise ValueError("held_out must name sources with streaming: true, a share of a stream is not known")
        if self.measure and not self.held_out_names:
            raise ValueError("measure needs held_out, on which it measures")
        check_arguments(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """From plain values, as a file has them; raises TypeError for a key that is missing or unknown."""
        values = dict(values)
        if "data" in values:
            values["data"] = _sources("data", values["data"])
        if not isinstance(values.get("held_out"), float | int):
            values["held_out"] = _sources("held_out", values["held_out"]) if values.get("held_out") else ()
        if "tuning" in values:
            values["tuning"] = _typed("tuning", Tuning, values["tuning"])
        values["measure"] = _typed("measure", Measure, values["measure"]) if values.get("measure") else None
        return cls(**values)

    @property
    def held_out_sources(self) -> tuple[Source, ...]:
        return () if isinstance(self.held_out, float) else self.held_out

    @property
    def held_out_names(self) -> list[str]:
        """Under which losses are reported."""
        if isinstance(self.held_out, float):
            return ["held_out"]
        return list(reported_names(self.held_out_sources))

    def build_objective(self) -> Objective:
        """What the model is trained by, in the form that fits what is tuned."""
        return self.tuning.fit(build_objective(self.objective, self.objective_options))

    def attention_on(self, device: torch.device, config: PretrainedConfig) -> str:
        """The ``attn_implementation`` of a run of such a model; raises ValueError for one that cannot train there."""
        if self.attention == "flex_attention" and device.type == "cpu":
            raise ValueError("attention 'flex_attention' cannot train on a CPU: PyTorch has no backward for it there")
        if self.attention is not None:
            return self.attention
        if self.compile and device.type == "cpu":  # how many keys a tile sees is not known to a compiler
            return "sdpa"
        return fastest_attention(device, config)

    def training_arguments(self) -> TrainingArguments:
        """What the Trainer gets; see :func:`finetune.arguments.training_arguments`."""
        return training_arguments(self)


def fastest_attention(device: torch.device, config: PretrainedConfig) -> str:
    """The ``attn_implementation`` that trains such a model fastest under the masks of set blocks."""
    if device.type == "cpu":
        return tiles.NAME
    return "flex_attention" if device.type == "cuda" and head_size(config) >= FLEX_HEADS else "sdpa"


def head_size(config: PretrainedConfig) -> int:
    """Numbers in a key of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a file or a packaged recipe and apply ``key=value`` overrides.

    ``training.learning_rate=1e-4`` reaches into a mapping.
    """
    values = read_recipe(name, overrides)
    try:
        return Recipe.from_dict(values)
    except TypeError as error:  # a required key is missing
        raise ValueError(f"recipe {str(find_recipe(name))!r}: {str(error).replace('Recipe.__init__() ', '')}") from None


def _check_sizes(key: str, options: Mapping[str, Any], longest: int) -> None:
    """Raise ValueError for blocks and windows that are longer than a row, those of nested options among them."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            _check_sizes(f"{key}.{name}", value, longest)
        elif name in ("block_size", "block_sizes", "window"):
            sizes = value if isinstance(value, list | tuple) else [value]
            size = max((size for size in sizes if isinstance(size, int)), default=0)
            if size > longest:
                raise ValueError(f"{key}.{name} must be at most the sequence_length of {longest}, got {size}")


def _sources(key: str, values) -> tuple[Source, ...]:
    """The sources of a list of them, or of a single one."""
    values = [values] if isinstance(values, str | Mapping) else values
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{key} must name files or data sets, got {values!r}")
    return tuple(_typed(key, Source, value) for value in values)


def _typed(key: str, kind: type, values):
    """The dataclass ``kind`` from a mapping under ``key``, or from a single value for its first field."""
    known = [f.name for f in dataclasses.fields(kind)]
    if not isinstance(values, Mapping):
        values = {known[0]: values}
    values, hints = dict(values), get_type_hints(kind)
    for name, value in values.items():
        check_known(f"{key}.{name}", name, known)
        if get_origin(hints[name]) is tuple and isinstance(value, str):
            values[name] = (value,)
        check_type(f"{key}.{name}", values[name], hints[name])
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{key}: {str(error).replace(f'{kind.__name__}.__init__() ', '')}") from None
