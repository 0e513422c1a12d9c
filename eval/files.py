"""Files of results: named within their folder, whole or not there, and written by one run at a time."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def in_folder(folder: Path, name: str, suffix: str) -> Path:
    """``folder/NAME.suffix``; raises ValueError for a name that could lead out of the folder."""
    if not re.fullmatch(r"\w[\w.+=,-]*", name):
        raise ValueError(
            f"name must be letters, digits and any of ._+=,- and begin with one of the first, got {name!r}"
        )
    return folder / f"{name}.{suffix}"


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` into ``path``, whole or not at all; folders are made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


class SoleWriter:
    """Whoever is in :meth:`writing` is the only one to write ``path``, of all processes; raises ValueError for another.

    The lock is a hidden file beside it. It belongs to a process and ends with it, however that ends.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Reentrant: the lock is given back at the end of the outermost ``with``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"another run is writing {str(self.path)!r}; wait until it has ended, or write elsewhere"
            ) from None
        try:
            yield
        finally:
            self._lock.release()
