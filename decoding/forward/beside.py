"""What stock files have no place for is saved beside them: by ``model.save_pretrained`` as well, and never in silence."""

import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel


@runtime_checkable
class SavedBeside(Protocol):
    """A module on a model that stock transformers does not know and that is saved in files beside the model's."""

    def extra_files(self, model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """The files by name; what they hold is taken out of ``weights``, the model's state."""


def read_settings_beside(folder: str | Path, file: str, kinds: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The JSON object in ``file`` of ``folder``, whose keys ``kinds`` must hold values of these types.

    Raises ValueError if there is none, so no ``what``, or if it cannot be one.
    """
    try:
        settings = json.loads((Path(folder) / file).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{str(folder)!r} holds no {what}: {file} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} in {str(folder)!r} is not JSON: {error}") from None
    known = settings if isinstance(settings, dict) else {}
    for name, kind in kinds.items():
        if not isinstance(known.get(name), kind) or isinstance(known[name], bool):
            raise ValueError(f"{file} in {str(folder)!r} has no {name}, or one that cannot be")
    return settings


def saved_beside(model: PreTrainedModel) -> dict[str, SavedBeside]:
    """The modules on ``model`` that have files of their own, by name."""
    return {name: module for name, module in model.named_children() if isinstance(module, SavedBeside)}


@contextmanager
def settings_without(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the generation config is as it was before such modules came: they keep in their files what they set there."""
    config = model.generation_config
    before: dict[str, Any] = {}
    for module in saved_beside(model).values():
        before = {**getattr(module, "replaced", {}), **before}
    now = {name: getattr(config, name, None) for name in before}
    vars(config).update(before)
    try:
        yield
    finally:
        vars(config).update(now)


def save_beside() -> None:
    """Let ``save_pretrained`` save these modules too, in files that :func:`decoding.load_model` finds.

    A call that names a ``state_dict`` decides for itself what is saved; models without such modules are saved as ever.
    """
    original = PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        modules = saved_beside(self)
        if not modules or len(args) > 1 or kwargs.get("state_dict") is not None:
            return original(self, save_directory, *args, **kwargs)
        weights = self.state_dict()
        files: dict[str, bytes] = {}
        for module in modules.values():
            files |= module.extra_files(self, weights)
        with settings_without(self):
            original(self, save_directory, *args, **kwargs | {"state_dict": weights})
        if args[0] if args else kwargs.get("is_main_process", True):
            for name, content in files.items():
                Path(save_directory, name).write_bytes(content)
        warnings.warn(
            f"{str(save_directory)!r}: {' and '.join(modules)} lies beside the model; decoding.load_model opens all of it, "
            f"from_pretrained the model alone",
            stacklevel=2,
        )
        return None

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign, assignment]


save_beside()
