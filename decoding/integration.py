"""How decoders reach every call of ``model.generate``, inside pipelines and trainers too."""

import functools

from transformers import PreTrainedModel

from decoding.decoder import Decoder
from decoding.engine import Engine


def install(model: PreTrainedModel, decoder: Decoder, engine: Engine | None = None) -> None:
    """Make every later ``model.generate()`` use ``decoder``, inside pipelines and trainers too, until ``uninstall``.

    A call that names another ``custom_generate`` gets that. ``engine``: run on this one instead of the one that is kept
    for the model. Raises ValueError if ``decoder`` is not a Decoder.
    """
    if not isinstance(decoder, Decoder):
        raise ValueError(f"decoder must be a Decoder, got {decoder!r}")
    uninstall(model)
    original = model.generate

    @functools.wraps(original)
    def generate(*args, **kwargs):
        if kwargs.setdefault("custom_generate", decoder) is decoder and engine is not None:
            kwargs.setdefault("engine", engine)
        return original(*args, **kwargs)

    model.generate = generate


def uninstall(model: PreTrainedModel) -> None:
    """Undo ``install``; harmless where nothing was installed."""
    vars(model).pop("generate", None)
