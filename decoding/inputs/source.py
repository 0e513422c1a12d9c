"""Where a model is, a folder, a GGUF file or a name on the hub; known without torch, before anything is loaded."""

import importlib.util
import json
from pathlib import Path

ADAPTER_FILE = "gated_adapter.json"
SELECTOR_FILE = "draft_selector.json"
LOW_RANK_FILE = "adapter_config.json"  # of peft
GGUF_NEEDS = ("gguf", "accelerate")  # modules of the extra "gguf"
MODEL_FILES = ("config.json", LOW_RANK_FILE, ADAPTER_FILE, SELECTOR_FILE)
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # what configurations call their number
MOST_LAYERS = 10_000  # many more than any model has; libraries make a list of as many as a file says


def check_source(source: str, *, named: str | None = None, made_in: str | None = None) -> None:
    """Raise ValueError if ``source`` can only be a mistyped path, or is a folder without a model.

    A hub name is OWNER/NAME; one whose owner is a folder here is a path that was mistyped or not yet made, and asking the
    hub for it takes long without a network. named: what the message calls it. made_in: a folder that this run makes, so
    that what begins like it is a path as well.
    """
    named, path = named or f"model {source!r}", Path(source).expanduser()
    if path.is_file():
        if not is_gguf(source):
            raise ValueError(
                f"{named} is a file; give the folder that holds it, the one with config.json, or a .gguf file"
            )
        missing = [module for module in GGUF_NEEDS if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"{named} needs {' and '.join(missing)} to be read: pip install 'setflow[gguf]'")
        return
    if source and path.is_dir():
        if not any((path / name).is_file() for name in (*MODEL_FILES, "tokenizer_config.json")):
            raise ValueError(f"{named} has no config.json, so there is no model in it")
        check_layers(path, named)
        return
    owner, _, name = source.partition("/")
    ours = Path(owner).is_dir() or made_in is not None and owner == Path(made_in).parts[0]
    if not owner or not name or "/" in name or owner.startswith((".", "~")) or ours:
        raise ValueError(f"{named} does not exist; give a folder with config.json, or a hub name OWNER/NAME")


def check_layers(folder: Path, named: str) -> None:
    """Raise ValueError if ``config.json`` of ``folder`` names a number of layers that no model has; it may be absent."""
    try:
        settings = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # which is said where the model is loaded
        return
    for name in LAYERS:
        count = settings.get(name) if isinstance(settings, dict) else None
        if isinstance(count, int) and not 1 <= count <= MOST_LAYERS:
            raise ValueError(
                f"{named} cannot be loaded: {name} of its config.json must be a whole number from 1 to {MOST_LAYERS}, "
                f"got {count}"
            )


def located(source: str) -> str:
    """``source`` with a home directory put in, as libraries want it: they know no "~"."""
    path = Path(source).expanduser()
    return str(path) if path.exists() else source


def is_gguf(source: str) -> bool:
    """Whether ``source`` is a model in one file of llama.cpp's."""
    path = Path(source).expanduser()
    return path.suffix.lower() == ".gguf" and path.is_file()
