"""One door for models of every kind: stock ones, gated adapters, models with an offset code.

    model, tokenizer = load_model(SOURCE)

What is trained here is kept in stock files, and what stock files have no place for lies beside them (``EXTRAS``).
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from decoding.forward.adapter import WEIGHTS_FILE, base_of
from decoding.inputs.generation_config import check_generation_config, check_generation_file
from decoding.inputs.hub import hub_or_cache
from decoding.inputs.source import (
    ADAPTER_FILE,
    LOW_RANK_FILE,
    SELECTOR_FILE,
    check_layers,
    check_source,
    is_gguf,
    located,
)

# Files beside a model's weights, and "module:function" that puts what is in them on the model: function(model, folder).
# Imported when there are such files, because methods stand on this package.
EXTRAS: dict[tuple[str, ...], str] = {
    ("offset_code.safetensors",): "rpt:load_offset_code",
    (ADAPTER_FILE, WEIGHTS_FILE): "decoding.forward.adapter:load_adapter",
    (LOW_RANK_FILE,): "decoding.forward.adapter:load_low_rank",
    (SELECTOR_FILE,): "sbd.selector:load_selector",
}


def load_model(
    source: str, *, tokenizer: str | None = None, trust_remote_code: bool = False, **settings: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model ``source``, a folder, a GGUF file or a name on the hub, with all that belongs to it, and its tokenizer.

    A folder may hold a whole model; an adapter, gated or peft's, or a selector, that names the model it was trained on; and
    files of ``EXTRAS``.
    tokenizer: where that is, by default with the model. trust_remote_code: whether code that lies with the model may run;
    nobody is asked. settings: as ``from_pretrained`` takes them; dtype is that of the files by default.

    Raises ValueError, in one sentence, if there is no such model or if it cannot be loaded.
    """
    tokens = load_tokenizer(tokenizer or source, trust_remote_code)
    return load_weights(source, trust_remote_code, **settings), tokens


def load_tokenizer(source: str, trust_remote_code: bool = False, field: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer alone. field: what the user calls ``source``, for messages."""
    check_source(source, named=f"{field} {source!r}")
    with one_sentence(f"{field} {source!r}"), hub_or_cache(source):
        if is_gguf(source):
            return _of_gguf("tokenizer", source)
        return AutoTokenizer.from_pretrained(located(source), trust_remote_code=trust_remote_code)


def load_config(source: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration alone, that of the base model where ``source`` is an adapter."""
    check_source(source)
    with one_sentence(f"model {source!r}"), hub_or_cache(source), hub_or_cache(base := base_model_of(source)):
        if is_gguf(base):
            return _of_gguf("config", base)
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)


def load_weights(source: str, trust_remote_code: bool = False, **settings: Any) -> PreTrainedModel:
    """The model alone, in evaluation mode."""
    check_source(source)
    settings = {"dtype": "auto", "trust_remote_code": trust_remote_code} | settings
    with one_sentence(f"model {source!r}"), hub_or_cache(source), hub_or_cache(base := base_model_of(source)):
        if is_gguf(base):
            del settings["trust_remote_code"]  # there is no code in such a file
            model = _of_gguf("model", base, **settings)
            attach_extras(model, source)
            return model.eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(weights_of(source), output_loading_info=True, **settings)
        model, info = loaded
        vars(model).pop("generate", None)  # one of the folder's own would stand in the way of every decoder
        # Weights that are not in the files are random, and nobody should miss that because the log is quiet.
        absent = _not_loaded(model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if absent:
            warnings.warn(
                f"model {source!r}: {len(absent)} weights are not in its files and are random: {absent[0]}, ...",
                stacklevel=2,
            )
        attach_extras(model, source)
    return model.eval()


def _not_loaded(model: PreTrainedModel, absent: set[str]) -> list[str]:
    """Of the names ``absent`` in the files those whose weights have no other name that is there, as tied ones have."""
    places: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(weight), set()).add(name)
    tied = set().union(*(names for names in places.values() if names - absent))
    return sorted(absent - tied)


def _of_gguf(what: str, source: str, **settings: Any) -> Any:
    """The "config", "tokenizer" or "model" in the file ``source``; what reads it needs newer libraries than all else."""
    return getattr(import_module("decoding.forward.gguf"), f"gguf_{what}")(located(source), **settings)


def weights_of(source: str) -> str:
    """Where the weights of ``source`` are: with its base model, if it is a gated adapter or a selector."""
    places = _stands_on(source)
    if len(places) > 1:
        check_layers(Path(places[0]), f"base model {places[0]!r}")
    return places[0]


def base_model_of(source: str) -> str:
    """The model to load where adapters of all kinds are attached after that, by :func:`attach_extras`."""
    file = _beside(source, LOW_RANK_FILE)
    return weights_of(source) if file is None else json.loads(file.read_text())["base_model_name_or_path"]


def attach_extras(model: PreTrainedModel, source: str) -> None:
    """Put on ``model``, which has the weights of ``source``, what lies beside them; then it can be run.

    Raises ValueError for a generation config that makes no sense.
    """
    for place in _stands_on(source):
        attach_from(model, place)
    check_generation_file(_beside(weights_of(source), "generation_config.json"))
    check_generation_config(model.generation_config)


def attach_from(model: PreTrainedModel, place: str) -> None:
    """Put on ``model`` what lies in the folder or hub repository ``place`` beside weights, and nothing from elsewhere."""
    for files, attach in EXTRAS.items():
        found = [path for file in files if (path := _beside(place, file)) is not None]
        if len(found) == len(files):
            module, _, function = attach.partition(":")
            getattr(import_module(module), function)(model, found[0].parent)


def _stands_on(source: str) -> list[str]:
    """The places of what ``source`` is made of, from the one that holds the weights to ``source`` itself."""
    base, place = None, located(source)
    if (file := _beside(source, ADAPTER_FILE)) is not None:
        base = base_of(file.parent)
    elif (file := _beside(source, SELECTOR_FILE)) is not None:
        base = base_of(file.parent, SELECTOR_FILE)
    return [place] if base in (None, place) else [*_stands_on(base), place]


def _beside(source: str, file: str) -> Path | None:
    """``file`` of a folder, or of a model on the hub, if it is there."""
    folder = Path(located(source))
    if folder.is_file():
        return None
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        found = cached_file(source, file)
    except OSError:
        return None
    return None if found is None else Path(found)


@contextmanager
def one_sentence(named: str, verb: str = "loaded", keep: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Inside, what a library raises becomes a ValueError: ``named`` cannot be ``verb``; each format has errors of its own.

    Those of the kinds in ``keep`` stay as they are.
    """
    try:
        yield
    except keep:
        raise
    except Exception as error:
        raise ValueError(f"{named} {_reason(error, verb)}") from error


def _reason(error: Exception, verb: str) -> str:
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return (
            "comes with code of its own, which runs only with your consent: read it, then say --trust-remote-code to generate, "
            "chat or eval, or trust_remote_code=True in Python; recipes, sweeps and benchmarks never run such code"
        )
    if "ignore_mismatched_sizes" in said:
        return f"cannot be {verb}: its weights have other shapes than its config.json says"
    if "Weights only load failed" in said:
        return f"cannot be {verb}: its weights are a pickle that holds more than weights, which would run code"
    if isinstance(error, ValueError | OSError | RuntimeError) and said:
        return f"cannot be {verb}: {said}"
    return f"cannot be {verb}: {type(error).__name__}{': ' if said else ''}{said}"
