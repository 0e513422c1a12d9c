"""What transformers drops on the way from ``model.generate`` to a decoder, kept.

It drops ``streamer``, ``tokenizer``, ``assistant_model`` and the like before it calls a callable ``custom_generate``:
stop strings would fail for want of a tokenizer, and a streamer would stay silent.
"""

import functools

from transformers import GenerationMixin


def keep_arguments_for(kind: type) -> None:
    """Wrap the one method that drops them, for every ``custom_generate`` of ``kind``; other calls go through untouched."""
    original = GenerationMixin._extract_generation_mode_kwargs

    @functools.wraps(original)
    def extract(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        """Pass on to ``kind`` everything that the original would collect for ``generate``'s own loops."""
        if not isinstance(custom_generate, kind):
            return original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        own = original(self, custom_generate, dict(kwargs), synced_gpus, assistant_model, streamer)
        standard = original(self, None, kwargs, synced_gpus, assistant_model, streamer)
        for name in own:
            kwargs.pop(name, None)
        return standard | own

    GenerationMixin._extract_generation_mode_kwargs = extract
