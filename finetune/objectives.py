"""The objectives that a recipe can name, and what each asks of model and tokenizer beside its loss.

A new method is one line in ``METHODS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from decoding.forward.noise_level import add_noise_level_rows
from finetune.mask_token import choose_mask_token, initialise_mask_token
from rpt import save_offset_code


def _nothing(*arguments) -> None:
    pass


def _save_offset_code(model, weights, folder) -> None:
    """The code that this run trained, or that its model came with."""
    if (table := weights.pop("offset_code.table", None)) is not None:
        save_offset_code(model, folder, table)


@dataclass(frozen=True)
class Method:
    """How to train with one objective.

    objective: "module:Class" of a callable ``(model, batch) -> (loss, metrics)``; imported when a recipe names it.
    prepare: called as ``prepare(objective, model, tokenizer)`` before training, after the weights are loaded and before
        adapters and optimizer are made: the place to set a mask token or to add modules.
    record: called likewise after training, before saving: the place to write what was trained into
        ``model.generation_config``, where decoders look for it.
    save: called as ``save(model, weights, folder)`` right before the model is saved to ``folder``: the place to take out of
        ``weights``, its state dictionary, what stock transformers would not know, and to write it to a file of its own.
    """

    objective: str
    prepare: Callable[[Any, Any, Any], None] = _nothing
    record: Callable[[Any, Any, Any], None] = _nothing
    save: Callable[[Any, dict[str, Tensor], Path], None] = _save_offset_code

    def build(self, options):
        """The objective with ``options`` (its fields); raises ValueError for an unknown one."""
        module, _, name = self.objective.partition(":")
        try:
            return getattr(import_module(module), name)(**options)
        except TypeError as error:
            raise ValueError(f"objective_options: {str(error).replace('.__init__()', '')}") from None


def _prepare_set_blocks(objective, model, tokenizer) -> None:
    initialise_mask_token(model, choose_mask_token(model, tokenizer, objective.mask_token_id))


def _record_set_blocks(objective, model, tokenizer) -> None:
    model.generation_config.trained_block_sizes = list(objective.block_sizes)


def _prepare_flow(objective, model, tokenizer) -> None:
    if objective.source == "mask":
        mask_token_id = choose_mask_token(model, tokenizer, objective.mask_token_id)
        if getattr(model.config, "flow", None) is None:
            initialise_mask_token(model, mask_token_id)
    if objective.takes_level:
        add_noise_level_rows(model)


def _record_flow(objective, model, tokenizer) -> None:
    traits, settings = objective.traits(model), model.generation_config
    model.config.flow = traits.as_dict()
    settings.trained_block_sizes = None if traits.block_sizes is None else list(traits.block_sizes)
    settings.suppress_tokens = list(traits.excluded) or None


def _prepare_resampling(objective, model, tokenizer) -> None:
    objective.prepare(model)


def _prepare_both(objective, model, tokenizer) -> None:
    _prepare_set_blocks(objective.set_block_objective, model, tokenizer)
    _prepare_resampling(objective.resample_objective, model, tokenizer)


def _record_both(objective, model, tokenizer) -> None:
    _record_set_blocks(objective.set_block_objective, model, tokenizer)


METHODS = {
    "ntp": Method("decoding:NextTokenObjective"),
    "sbd": Method("sbd:SetBlockObjective", _prepare_set_blocks, _record_set_blocks),
    "rpt": Method("rpt:ResampleObjective", _prepare_resampling),
    "sbd+rpt": Method("finetune.both:SetBlockResampleObjective", _prepare_both, _record_both),
    "dfm": Method("dfm:FlowObjective", _prepare_flow, _record_flow),
}
