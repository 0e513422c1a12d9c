"""Recipes: what to train, on what, and how, as one YAML file with typed and checked keys."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from decoding import decoder_from_spec
from finetune.objectives import METHODS


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everybody expects, and not a text, as YAML 1.1 has it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Recipe:
    """One training run. Raises ValueError for a key or a value that makes no sense, with the nearest known name.

    output: folder for checkpoints and, at the end, the model.
    data: JSONL files with a ``text`` field, all mixed in proportion to their length.
    held_out: JSONL files on which the next-token loss is measured, each reported under its file name.
    model: folder or hub name of the model to start from; absent if ``new_model`` is given.
    new_model: keyword arguments of LlamaConfig for a model trained from scratch, with ``tokenizer``.
    tokenizer: folder or hub name; by default the model's own.
    objective: a name in ``finetune.objectives.METHODS``, such as "ntp" or "sbd".
    objective_options: the fields of that objective.
    sequence_length: tokens in a packed row.
    decoder: decoder spec that the model is saved with as its default.
    compile: compile the trunk (torch.compile), which pays on runs of more than a few minutes.
    training: keyword arguments of transformers' TrainingArguments.
    """

    output: str
    data: tuple[str, ...]
    objective: str
    held_out: tuple[str, ...] = ()
    model: str | None = None
    new_model: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    sequence_length: int = 512
    decoder: str | None = None
    compile: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.objective not in METHODS:
            raise ValueError(f"objective must be one of {', '.join(METHODS)}, got {self.objective!r}")
        if (self.model is None) == (self.new_model is None):
            raise ValueError(
                "give either model (a folder or hub name) or new_model (a LlamaConfig), not both or neither"
            )
        if self.new_model is not None and self.tokenizer is None:
            raise ValueError("tokenizer is needed with new_model: a folder or hub name")
        if self.decoder is not None:
            decoder_from_spec(self.decoder)
        known = [f.name for f in dataclasses.fields(TrainingArguments)]
        for name in self.training:
            _check_known(f"training.{name}", name, known)

    def training_arguments(self) -> TrainingArguments:
        settings = {"report_to": "none", **self.training}
        if settings.get("bf16") and not _computes_in_bf16(settings):
            # Without the instructions, autocast converts back and forth: 30 times slower than float32 on one CPU.
            print("bf16: this CPU has no bf16 instructions, so the run computes in float32", file=sys.stderr)
            settings["bf16"] = False
        return TrainingArguments(output_dir=self.output, remove_unused_columns=False, **settings)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply ``key=value`` overrides; ``training.learning_rate=1e-4`` reaches into a mapping."""
    try:
        values = yaml.load(Path(path).read_text(), _Loader)
    except FileNotFoundError:
        raise ValueError(f"recipe {str(path)!r} does not exist") from None
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {str(path)!r} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping of keys to values")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"an override has the form key=value, got {override!r}")
        *parents, last = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.load(text, _Loader)
    known = [f.name for f in dataclasses.fields(Recipe)]
    for name in values:
        _check_known(name, name, known)
    for name in ("data", "held_out"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    try:
        return Recipe(**values)
    except TypeError as error:  # a required key is missing
        raise ValueError(f"recipe {str(path)!r}: {str(error).replace('Recipe.__init__() ', '')}") from None


def _computes_in_bf16(settings: Mapping[str, Any]) -> bool:
    on_cpu = settings.get("use_cpu") or not torch.accelerator.is_available()
    return not on_cpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _check_known(shown: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"unknown key {shown!r}" + (f", did you mean {near[0]!r}?" if near else ""))
