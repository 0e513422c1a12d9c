"""Folders of files that are whole or do not count: a manifest of sizes and hashes is written last.

A kill, a full disk or a fault of the disk can leave any file of a checkpoint half written, empty or missing.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST_FILE = "manifest.json"
KEPT = {"bytes", "sha256"}  # of each file
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def write_manifest(folder: str | Path, files: Iterable[Path] | None = None) -> None:
    """Declare ``folder`` whole as it is now: sizes in bytes and SHA-256 of ``files``, by default of all in it."""
    folder = Path(folder)
    paths = folder.rglob("*") if files is None else files
    paths = sorted(path for path in paths if path.is_file() and path != folder / MANIFEST_FILE)
    for path in paths:  # else a loss of power could leave the manifest without them
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / MANIFEST_FILE, {str(path.relative_to(folder)): fingerprint(path) for path in paths})


def damage(folder: str | Path, content: bool = True) -> str | None:
    """What is wrong with ``folder``, for a sentence; None if each file in its manifest is as it was written.

    content: read the files; else only their sizes are looked at.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        return f"{MANIFEST_FILE} is missing"
    manifest = read_json(folder / MANIFEST_FILE)
    if not manifest or any(not isinstance(entry, dict) or entry.keys() != KEPT for entry in manifest.values()):
        return f"{MANIFEST_FILE} is damaged"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
        if content and fingerprint(path) != expected:
            return f"the content of {name} has changed"
    return None


def last_checkpoint(folder: str | Path, told: Callable[[str], None] = lambda sentence: None) -> str | None:
    """The newest whole checkpoint in ``folder``, if there is one; ``told`` hears which newer ones are damaged."""
    for path in reversed(_checkpoints(folder)):
        found = damage(path)
        if found is None:
            return str(path)
        told(f"{path} is damaged and not used: {found}")
    return None


def rotate(folder: str | Path, limit: int, kept: Iterable[str | None] = ()) -> None:
    """Delete all checkpoints in ``folder`` but the newest ``limit`` whole ones and those ``kept``."""
    paths = _checkpoints(folder)
    whole = [path for path in paths if damage(path, content=False) is None]
    spared = {*whole[-limit:], *(Path(path) for path in kept if path is not None)}
    for path in paths:
        if path not in spared:
            shutil.rmtree(path, ignore_errors=True)


def fingerprint(path: Path) -> dict[str, int | str]:
    """Size and hash of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write_json(path: Path, values: Any) -> None:
    """Write all of it or, if that fails or is cut off, leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(json.dumps(values, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict | None:
    """The mapping in ``path``; None if it is missing or damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _checkpoints(folder: str | Path) -> list[Path]:
    """All of them, by step."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]
