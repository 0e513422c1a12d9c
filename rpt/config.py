"""How a model was trained to predict previous tokens, and whether it can be asked for them.

Source: Resample-Previous-Tokens, arXiv 2506.06215.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

from transformers import PretrainedConfig, PreTrainedModel

from decoding.inputs.checks import check_choice, check_count, check_range


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
    def from_config(cls, config: PretrainedConfig) -> "ResampleConfig":
        """What ``config.resample`` of a model says; raises ValueError if the model was not trained for it."""
        values = getattr(config, "resample", None)
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
        allowed = range(self.window if self.perm == "rotate" else 2, self.window + 1)
        if window not in allowed:
            raise ValueError(
                f"window must be one of {', '.join(map(str, allowed))} for this model (trained with window "
                f"{self.window}, perm {self.perm!r}), got {window}"
            )


def check_resampling(model: PreTrainedModel, window: int) -> None:
    """Raise ValueError if ``model`` cannot run previous-token rows of ``window`` tokens."""
    config = ResampleConfig.from_config(model.config)
    config.check_decoding(window)
    if getattr(model, "offset_code", None) is None:
        raise ValueError(
            "this model has no offset code: load it with decoding.load_model, or call rpt.load_offset_code(model, folder)"
        )
    if config.rope_index == "token" and getattr(model.config, "sliding_window", None) is not None:
        raise ValueError(
            "rope_index='token' does not go with a sliding window: rows would see other keys than in training"
        )
