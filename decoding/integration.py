"""How decoders reach ``model.generate``, and how nothing that the user passed gets lost on the way.

transformers drops ``streamer``, ``tokenizer``, ``assistant_model`` and the like before it calls a callable
``custom_generate``: stop strings would fail for want of a tokenizer, and a streamer would stay silent. Importing this
module wraps the one method that drops them; calls without one of our decoders go through untouched.
"""

import functools

from transformers import GenerationMixin, PreTrainedModel

from decoding.decoder import Decoder

_original_extract = GenerationMixin._extract_generation_mode_kwargs


@functools.wraps(_original_extract)
def _extract_keeping_all(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
    """Pass on to a Decoder everything that the original would collect for ``generate``'s own loops."""
    if not isinstance(custom_generate, Decoder):
        return _original_extract(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
    own = _original_extract(self, custom_generate, dict(kwargs), synced_gpus, assistant_model, streamer)
    standard = _original_extract(self, None, kwargs, synced_gpus, assistant_model, streamer)
    for name in own:
        kwargs.pop(name, None)
    return standard | own


GenerationMixin._extract_generation_mode_kwargs = _extract_keeping_all


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
