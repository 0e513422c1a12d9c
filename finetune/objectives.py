"""The objectives that a recipe can name. A new one is a line in ``OBJECTIVES``."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from decoding import Objective

# "module:Class", imported when a recipe names it.
OBJECTIVES = {
    "ntp": "decoding:NextTokenObjective",
    "sbd": "sbd:SetBlockObjective",
    "rpt": "rpt:ResampleObjective",
    "sbd+rpt": "finetune.both:SetBlockResampleObjective",
    "dfm": "dfm:FlowObjective",
}


def build_objective(name: str, options: Mapping[str, Any]) -> Objective:
    """The objective called ``name`` with its fields ``options``; raises ValueError for an impossible one."""
    module, _, kind = OBJECTIVES[name].partition(":")
    try:
        return getattr(import_module(module), kind)(**options)
    except TypeError as error:
        raise ValueError(f"objective_options: {str(error).replace('.__init__()', '')}") from None
