"""The objectives that a recipe can name: those of ``OBJECTIVES``, and "module:Class" of one's own."""

from collections.abc import Mapping
from typing import Any

from decoding import Objective
from decoding.inputs.checks import check_choice, named_object

# "module:Class", imported when a recipe names it.
OBJECTIVES = {
    "ntp": "decoding:NextTokenObjective",
    "sbd": "sbd:SetBlockObjective",
    "rpt": "rpt:ResampleObjective",
    "sbd+rpt": "finetune.both:SetBlockResampleObjective",
    "dfm": "dfm:FlowObjective",
    "dfm-transition": "dfm:TransitionObjective",
}


def check_objective(name: str) -> None:
    """Raise ValueError for a name that is neither known nor module:Class."""
    if ":" not in name:
        check_choice("objective", name, tuple(OBJECTIVES))


def build_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """The objective called ``name`` with ``options``, its fields; raises ValueError for an unknown or impossible one."""
    kind = named_object("objective", OBJECTIVES.get(name, name))
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"objective_options: {str(error).replace('.__init__()', '')}") from None
