"""Gated adapters in the box, for real models that lie elsewhere: found by the model's own weights, or by name."""

from pathlib import Path
from typing import TYPE_CHECKING

from decoding.inputs.source import ADAPTER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGED = {"smollm2": Path(__file__).parent / "smollm2-gated"}
AUTO, NONE = "auto", "none"


def check_adapter(name: str) -> None:
    """Raise ValueError if ``name`` is neither "auto", "none", the name of a packaged adapter, nor a folder that holds one."""
    if name in (AUTO, NONE) or (_folder(name) / ADAPTER_FILE).is_file():
        return
    if name in PACKAGED:
        raise ValueError(f"this installation has no adapter {name!r}")
    known = ", ".join((AUTO, NONE, *PACKAGED))
    raise ValueError(f"adapter must be {known}, or a folder with {ADAPTER_FILE}, got {name!r}")


def add_adapter(model: "PreTrainedModel", name: str = AUTO) -> str | None:
    """Put the adapter ``name`` on ``model``; returns its name, None if there is none to put there.

    "auto": the packaged adapter that was made for these weights, if there is one and the model drafts nothing by itself.
    Text stays the model's own. Raises ValueError for an adapter of another model.
    """
    from decoding.forward.adapter import read_settings
    from decoding.forward.base_check import same_weights, sample_weights
    from decoding.forward.loading import attach_from
    from decoding.forward.mask_token import has_mask_token

    check_adapter(name)
    if name == NONE:
        return None
    if name != AUTO:
        attach_from(model, str(_folder(name)))
        return name
    sample = None if has_mask_token(model) else sample_weights(model)
    for known, folder in PACKAGED.items():
        if sample is not None and (folder / ADAPTER_FILE).is_file():
            if same_weights(read_settings(folder).get("base_sample", []), sample):
                attach_from(model, str(folder))
                return known
    return None


def _folder(name: str) -> Path:
    return PACKAGED.get(name) or Path(name).expanduser()
