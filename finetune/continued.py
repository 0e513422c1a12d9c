"""A file of JSON lines that one run writes and the next continues: whole records, of the same settings, one run at a time."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from decoding.inputs.jsonl import BOM, parse
from finetune.checkpoints import write_json


@contextmanager
def locked(field: str, path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, which a kill releases; raises ValueError if another run holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"{field}: {str(path)!r} is being written by another run; wait for it, or name another file"
        ) from None


def whole_records(field: str, path: Path) -> int:
    """The number of records in ``path``; a last line that a kill or a full disk cut off is taken away.

    Raises ValueError for a line that is no JSON object and was not cut off so: it has an end, or is the only one of a file
    that no run has begun.
    """
    if not path.is_file():
        return 0
    count, place, cut, broken, line = 0, 0, 0, None, b"\n"
    with path.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = parse(line.removeprefix(BOM).rstrip(b"\r\n"))
                    if not isinstance(value, dict):
                        raise ValueError("is not a JSON object")
                    count += 1
                except ValueError as error:
                    broken = number, error
                    cut = place
                    if line.endswith(b"\n"):
                        raise _cannot_go_on(field, path, *broken) from None
            place += len(line)
        if broken is not None:
            if not count and not settings_file(path).is_file():
                raise _cannot_go_on(field, path, *broken)
            file.truncate(cut)
        elif not line.endswith(b"\n"):  # as an editor leaves it
            file.write(b"\n")
    return count


def _cannot_go_on(field: str, path: Path, number: int, error: ValueError) -> ValueError:
    return ValueError(f"{field}: {str(path)!r} cannot be continued: line {number} {error}")


def settings_file(path: Path) -> Path:
    """Where the settings of the records in ``path`` are kept."""
    return Path(f"{path}.settings.json")


def kept_settings(path: Path) -> dict[str, Any] | None:
    """What :func:`keep_settings` wrote for ``path``; None, with a warning, if there is nothing of it."""
    try:
        kept = json.loads(settings_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = None
    if not isinstance(kept, dict):
        warnings.warn(f"{path}: nothing says with which settings its texts were made; they are kept", stacklevel=3)
        return None
    return kept


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write ``settings`` beside ``path``, whole or not at all."""
    write_json(settings_file(path), settings)
