"""Set Block Decoding and Resample-Previous-Tokens in one run: some sequences train the one, the others the other.

A sequence is either masked or reordered: reordered clean tokens would change what the masked rows of SBD see.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.inputs.checks import check_range
from decoding.training.objective import Objective, RowsPerToken
from rpt import ResampleObjective
from sbd import SetBlockObjective


@dataclass(frozen=True)
class SetBlockResampleObjective(Objective):
    """Loss in nats: the mean over all targets of both objectives.

    resample_share: share of the sequences of a batch that train previous tokens; where it is no whole number of them, a
        coin decides about the last one. set_block, resample: the fields of SetBlockObjective and ResampleObjective.
    """

    tags = (*SetBlockObjective.tags, *ResampleObjective.tags)

    resample_share: float = 0.5
    set_block: Mapping[str, Any] = field(default_factory=dict)
    resample: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check_range("resample_share", self.resample_share, 0, 1)
        _ = self.set_block_objective, self.resample_objective  # check their fields
        if self.set_block_objective.curriculum:
            raise ValueError("set_block.curriculum is for objective sbd alone")

    @cached_property
    def set_block_objective(self) -> SetBlockObjective:
        return SetBlockObjective(**self.set_block)

    @cached_property
    def resample_objective(self) -> ResampleObjective:
        return ResampleObjective(**self.resample)

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.set_block_objective.prepare(model, tokenizer)
        self.resample_objective.prepare(model, tokenizer)

    def added_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        return [*self.resample_objective.added_parameters(model), *self.set_block_objective.added_parameters(model)]

    def added_token_ids(self, model: PreTrainedModel) -> list[int]:
        return self.set_block_objective.added_token_ids(model)

    def record(self, model: PreTrainedModel) -> None:
        self.set_block_objective.record(model)

    def rows_per_token(self) -> RowsPerToken:
        parts = self.resample_objective.rows_per_token(), self.set_block_objective.rows_per_token()
        share = self.resample_share
        return RowsPerToken(*(share * one + (1 - share) * other for one, other in zip(*parts, strict=True)))

    def __call__(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | int]]:
        rows = len(batch["input_ids"])
        count = int(self.resample_share * rows + torch.rand(()))
        parts = (self.resample_objective, slice(0, count)), (self.set_block_objective, slice(count, rows))
        total, num_targets, metrics = 0.0, 0, {}
        for objective, part in parts:
            if part.stop > part.start:
                loss, found = objective(model, {name: values[part] for name, values in batch.items()})
                total = total + loss * found["num_targets"]
                num_targets += found.pop("num_targets")
                metrics |= found
        return total / max(1, num_targets), metrics | {"num_targets": num_targets}
