"""How decoders are made of short texts, and reach every call of ``model.generate``, inside pipelines and trainers too."""

import functools
from pathlib import Path
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from decoding.decoder import Decoder
from decoding.engine import Engine
from decoding.inputs.spec import DECODERS, load_spec


def decoder_from_spec(spec: str) -> Decoder:
    """The decoder that ``spec`` describes (:mod:`decoding.inputs.spec`); keys are the fields of the decoder and of its rule.

    >>> decoder_from_spec("sbd:block_size=16,entropy_bound=0.1")
    SetBlockDecoder(block_size=16, rule=EntropyBound(entropy_bound=0.1, order='entropy', max_reveal=None), \
anchor=False, commit='block', revision=None, entropy_from='sampled', mask_token_id=None)

    Raises ValueError for an unknown decoder or key, with the nearest known name.
    """
    return load_spec(spec)


class InstalledGenerate:
    """Stands in the place of ``model.generate``; a copy of the model gets one of its own, which runs the copy."""

    def __init__(self, model: PreTrainedModel, decoder: Decoder, engine: Engine | None = None):
        self.model, self.decoder, self.engine = model, decoder, engine
        functools.update_wrapper(self, GenerationMixin.generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.setdefault("custom_generate", self.decoder) is self.decoder and self.engine is not None:
            kwargs.setdefault("engine", self.engine)
        return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple:
        return InstalledGenerate._restored, (), {"model": self.model, "decoder": self.decoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.decoder = state["model"], state["decoder"]

    @staticmethod
    def _restored() -> "InstalledGenerate":
        """An empty one: while a model is being copied or loaded, it is not there yet."""
        installed = InstalledGenerate.__new__(InstalledGenerate)
        installed.engine = None  # an engine is one model's
        return installed


def install(model: PreTrainedModel, decoder: Decoder, engine: Engine | None = None) -> None:
    """Make every later ``model.generate()`` use ``decoder``, inside pipelines and trainers too, until ``uninstall``.

    A call that names another ``custom_generate`` gets that. ``engine``: run on this one instead of the one that is kept
    for the model. Raises ValueError if ``decoder`` is not a Decoder.
    """
    if not isinstance(decoder, Decoder):
        raise ValueError(f"decoder must be a Decoder, got {decoder!r}")
    vars(model)["generate"] = InstalledGenerate(model, decoder, engine)


def uninstall(model: PreTrainedModel) -> None:
    """Undo ``install``; harmless where nothing was installed."""
    vars(model).pop("generate", None)


def refuse_specs() -> None:
    """Let ``generate`` say what to do with the spec of a decoder; it takes a text for the name of a repository."""
    original = GenerationMixin.load_custom_generate

    @functools.wraps(original)
    def load(self, pretrained_model_name_or_path=None, *args, **kwargs):
        name = str(pretrained_model_name_or_path)
        if name.partition(":")[0] in DECODERS and not Path(name).is_dir():
            raise ValueError(f"custom_generate must be a decoder, got a text; write decoder_from_spec({name!r})")
        return original(self, pretrained_model_name_or_path, *args, **kwargs)

    GenerationMixin.load_custom_generate = load  # type: ignore[method-assign]


refuse_specs()
