"""Previous-token rows: predict a token from the text before it and a few tokens after it, and decide whether to take it.

Source: Resample-Previous-Tokens, arXiv 2506.06215. Shapes: N rows, V vocabulary; w is the window, i the position of the
revised token, x_{i+1} .. x_{i+w-1} the tokens known after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.forward.rows import RowList
from decoding.forward.transfer import to_device
from decoding.inputs.checks import check_choice, check_range
from decoding.sampling import Context, LogitsPipeline, draw
from rpt.config import ResampleConfig

ACCEPT = ("gibbs", "argmax_threshold")


def add_previous_rows(
    rows: RowList, tokens: Sequence[int], i: int, window: int, config: ResampleConfig, slot: int, row_before: bool
) -> range:
    """Add the rows that predict ``tokens[i]`` from what stands before it and the window - 1 tokens after it.

    They go to slots from ``slot`` on. With ``row_before`` the row of token i - 1 is run again with the offset 2 that it
    had in training. Returns the rows that were added; the last of them predicts token i.
    """
    after = range(i + 1, i + window)
    shift = 1 if config.rope_index == "slot" else 0
    branch = [tokens[j] for j in after]
    positions = [j - shift for j in after]
    offsets = [1] * (window - 2) + [1 - window]
    if row_before:
        branch, positions, offsets = [tokens[i - 1], *branch], [i - 1, *positions], [2, *offsets]
    return rows.add_branch(branch, positions, offsets, i - row_before, slot)


@dataclass(frozen=True)
class AcceptRule:
    """What to put in the place of a token x, given its previous-token distribution P.

    accept: "gibbs" draws from P, always; "argmax_threshold" takes the likeliest token if its probability at temperature 1
        is at least ``threshold``, else keeps x.
    threshold: only for argmax_threshold; above 1 nothing is ever replaced.
    temperature: of P under "gibbs"; None is that of ``generate``, 0 takes the likeliest.
    """

    accept: Literal["gibbs", "argmax_threshold"] = "gibbs"
    threshold: float = 0.9
    temperature: float | None = None

    def __post_init__(self):
        check_choice("accept", self.accept, ACCEPT)
        check_range("threshold", self.threshold, 0)
        if self.temperature is not None:
            check_range("temperature_ptp", self.temperature, 0)

    def __call__(
        self,
        pipeline: LogitsPipeline,
        raw: Tensor,
        old: Sequence[int],
        context: Context,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Tokens [N] in the place of ``old`` [N], from logits ``raw`` [N, V] of previous-token rows."""
        if self.accept == "argmax_threshold":
            best = pipeline.at_temperature(1.0).process(raw, context).softmax(-1).max(-1)
            return torch.where(best.values >= self.threshold, best.indices, to_device(old, raw.device))
        if self.temperature is None:
            return pipeline.sample(pipeline.process(raw, context), generators)
        if self.temperature == 0:
            return pipeline.process(raw, context).argmax(-1)
        return draw(pipeline.at_temperature(self.temperature).process(raw, context).softmax(-1), generators)
