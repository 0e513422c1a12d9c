"""Previous-token rows: predict a token from the text before it and a few tokens after it, and decide whether to take it.

Source: Resample-Previous-Tokens, arXiv 2506.06215. Shared by the methods that revise what they have chosen. Shapes: N
rows, V vocabulary; w is the window, i the place of the revised token, x_{i+1} .. x_{i+w-1} the tokens known after it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper

from decoding.checks import check_choice, check_count, check_range
from decoding.forward.rows import RowList
from decoding.sampling import Context, TokenLaw, draw

ACCEPT = ("gibbs", "argmax_threshold")


@dataclass(frozen=True)
class ResampleConfig:
    """How a model was trained to predict previous tokens; written to ``model.config.resample`` and read by decoders.

    window: w, the largest number of neighbouring tokens that were reordered.
    sequence_share, window_share: s, the share of sequences with windows, and q, the share of their positions where one
        starts, at most 1 / (w + 1), or 1 in branches.
    layout: "windows" reorders the text itself (paper); "branches" leaves it as it is and puts previous-token rows beside
        it, as decoding does: many more targets, for 1 + q (w - 1) times the rows. Needs perm "rotate", prev_target "ntp".
    perm: order inside a window: "rotate" (its first token moves to its end), "uniform" over all other orders, or
        "rotate_mixed" (rotate a width drawn from 2 .. w). None is "rotate" for w = 2 and in branches, else "rotate_mixed".
    code_at: the offset code is added to the token embedding ("input") or, one table per layer, to what enters each
        layer ("layers").
    rope_index: a row's rotary position is that of its "slot" in the reordered text, or of its "token" in the plain text.
    prev_target: the row before a window predicts the token that now "follow"s it (offset above 1), or still the next one
        of the plain text ("ntp").
    """

    window: int = 2
    sequence_share: float = 0.5
    window_share: float = 0.02
    perm: Literal["rotate", "uniform", "rotate_mixed"] | None = None
    code_at: Literal["input", "layers"] = "input"
    rope_index: Literal["slot", "token"] = "slot"
    prev_target: Literal["follow", "ntp"] = "follow"
    layout: Literal["windows", "branches"] = "windows"

    def __post_init__(self):
        check_count("window", self.window, 2)
        check_range("sequence_share", self.sequence_share, 0, 1)
        check_choice("layout", self.layout, ("windows", "branches"))
        check_range("window_share", self.window_share, 0, 1 if self.layout == "branches" else 1 / (self.window + 1))
        if self.perm is None:
            whole = self.window == 2 or self.layout == "branches"
            object.__setattr__(self, "perm", "rotate" if whole else "rotate_mixed")
        check_choice("perm", self.perm, ("rotate", "uniform", "rotate_mixed"))
        check_choice("code_at", self.code_at, ("input", "layers"))
        check_choice("rope_index", self.rope_index, ("slot", "token"))
        check_choice("prev_target", self.prev_target, ("follow", "ntp"))
        for field, needed in (("perm", "rotate"), ("prev_target", "ntp")):
            if self.layout == "branches" and getattr(self, field) != needed:
                raise ValueError(f"{field} must be {needed!r} with layout 'branches', got {getattr(self, field)!r}")

    @classmethod
    def of(cls, model_config) -> "ResampleConfig":
        """What ``model_config.resample`` says; raises ValueError if the model was not trained for it."""
        values = getattr(model_config, "resample", None)
        if values is None:
            raise ValueError(
                "this model was not trained to predict previous tokens: its config has no 'resample'; fine-tune it with "
                "ResampleObjective, and load what that saved with decoding.load_model"
            )
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def as_dict(self) -> dict:
        """The form that ``model.config`` keeps."""
        return {field.name: asdict(self)[field.name] for field in fields(ResampleConfig)}

    def check_decoding(self, window: int) -> None:
        """Raise ValueError if rows of a window of ``window`` tokens were never seen in training."""
        if self.perm == "rotate":
            allowed = (self.window,)
        else:
            allowed = tuple(range(2, self.window + 1))
        if window not in allowed:
            raise ValueError(
                f"window must be one of {', '.join(map(str, allowed))} for this model (trained with window "
                f"{self.window}, perm {self.perm!r}), got {window}"
            )


def check_resampling(model, window: int) -> None:
    """Raise ValueError if ``model`` cannot run previous-token rows of ``window`` tokens."""
    config = ResampleConfig.of(model.config)
    config.check_decoding(window)
    if getattr(model, "offset_code", None) is None:
        raise ValueError(
            "this model has no offset code: load it with decoding.load_model, which takes it from the folder of the model"
        )
    if config.rope_index == "token" and getattr(model.config, "sliding_window", None) is not None:
        raise ValueError(
            "rope_index='token' does not go with a sliding window: rows would see other keys than in training"
        )


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
    """What to put in the place of a token x, given its previous-token law P.

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
        law: TokenLaw,
        raw: Tensor,
        old: Sequence[int],
        context: Context,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Tokens [N] in the place of ``old`` [N], from logits ``raw`` [N, V] of previous-token rows."""
        if self.accept == "argmax_threshold":
            best = at_temperature(law, raw, 1.0, context).softmax(-1).max(-1)
            return torch.where(best.values >= self.threshold, best.indices, torch.tensor(old, device=raw.device))
        if self.temperature is None:
            return law.choose(law.scores(raw, context), generators)
        if self.temperature == 0:
            return law.scores(raw, context).argmax(-1)
        return draw(at_temperature(law, raw, self.temperature, context).softmax(-1), generators)


def at_temperature(law: TokenLaw, raw: Tensor, temperature: float, context: Context | None = None) -> Tensor:
    """Processed logits [N, V] as if ``generate`` had been asked for ``temperature``; all other processors as they are."""
    processors = [p for p in law.processors if not isinstance(p, TemperatureLogitsWarper)]
    own = TemperatureLogitsWarper(float(temperature))
    place = next((i for i, p in enumerate(law.processors) if isinstance(p, TemperatureLogitsWarper)), len(processors))
    return replace(law, processors=type(law.processors)([*processors[:place], own, *processors[place:]])).scores(
        raw, context
    )
