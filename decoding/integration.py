"""How decoders reach every call of ``model.generate``, inside pipelines and trainers too."""

import functools

from transformers import PreTrainedModel

from decoding.decoder import Decoder


def install(model: PreTrainedModel, decoder: Decoder) -> None:
    """Make every later ``model.generate()`` use ``decoder``, inside pipelines and trainers too, until ``uninstall``.

    A call that names another ``custom_generate`` gets that. Raises ValueError if ``decoder`` is not a Decoder.
    """
    if not isinstance(decoder, Decoder):
        raise ValueError(f"decoder must be a Decoder, got {decoder!r}")
    uninstall(model)
    original = model.generate

    @functools.wraps(original)
    def generate(*args, **kwargs):
        kwargs.setdefault("custom_generate", decoder)
        return original(*args, **kwargs)

    model.generate = generate


def uninstall(model: PreTrainedModel) -> None:
    """Undo ``install``; harmless where nothing was installed."""
    vars(model).pop("generate", None)
