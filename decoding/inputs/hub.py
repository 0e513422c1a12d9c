"""The hub without a network: a question to it is answered within seconds, from what was downloaded before or by a refusal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

PATIENCE = (
    5.0  # seconds for the hub to answer at all; its own libraries ask six times, with pauses, for more than a minute
)


@contextmanager
def hub_or_cache(source: str | None = None) -> Iterator[None]:
    """Inside, the hub's libraries are in their offline mode if the hub cannot be reached now.

    They then take what is in their cache, and say at once what is not. Nobody is asked where ``source`` is a folder or a file.
    """
    if source is not None and Path(source).expanduser().exists():
        yield
        return
    places = [(constants, "HF_HUB_OFFLINE")]
    if "datasets" in sys.modules:  # it keeps copies
        places += [(sys.modules["datasets"].config, name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    if not constants.is_offline_mode() and not _answers():
        for module, name in places:
            setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _answers() -> bool:
    """Whether the hub says anything, through whatever proxies there are."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of the HTTP library, which has many
        return False
    return True
