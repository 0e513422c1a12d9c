"""Which tasks there are, known without importing lm-eval and torch.

lm-eval's own index reads all of its 14,000 files as YAML, which takes ten seconds; a look for a few keys takes half a one.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from decoding.inputs.checks import did_you_mean

OWN = ("mbpp_all", "mbpp_sanitized", "mbpp_sanitized_all", "mbpp_plus_tests", "additions", "next_statement")
# A key at the start of a line, and its value: in the same line, or the items of a list below it.
ENTRY = re.compile(rb"^[\"']?(task|group|tag|include)[\"']?:[ \t]*([^\n]*(?:\n[ \t]*-[^\n]*)*)", re.MULTILINE)
NAME = re.compile(r"[\w./+()-]+")


def find_data(folder: str | Path | None = None) -> Path | None:
    """``folder``, else the environment's SETFLOW_DATA, else None, which means the hub.

    Raises ValueError if the folder does not exist.
    """
    folder = folder or os.environ.get("SETFLOW_DATA")
    if folder and not Path(folder).is_dir():
        raise ValueError(f"data must be a folder, got {str(folder)!r}")
    return Path(folder) if folder else None


def expand_tasks(names: Sequence[str]) -> list[str]:
    """Single tasks for ``names``, among which groups and tags of lm-eval may be, each task once.

    Raises ValueError for an unknown name, with the nearest known one.
    """
    names = [name.strip() for name in names]
    if not all(names):
        raise ValueError(f"tasks must be names separated by commas, got {','.join(names)!r}")
    return list(dict.fromkeys(task for name in names for task in _expand(name)))


def find_definition(name: str) -> Path:
    """The YAML file that defines lm-eval's task ``name``."""
    tasks, groups = _index()
    if name not in tasks:
        guess = did_you_mean(name, [*OWN, *tasks, *groups])
        raise ValueError(f"task must be one of ours, or a task or group of lm-eval, got {name!r}{guess}")
    return tasks[name]


def _expand(name: str) -> list[str]:
    tasks, groups = _index()
    if name in OWN or name in tasks or name not in groups:
        if name not in OWN:
            find_definition(name)
        return [name]
    if groups[name] is None:
        raise ValueError(f"task {name!r} is a group of lm-eval that changes its tasks; name its tasks one by one")
    return [task for member in groups[name] for task in _expand(member)]


@functools.cache
def _index() -> tuple[dict[str, Path], dict[str, list[str] | None]]:
    """The file of each task of lm-eval, and what is in each group and under each tag.

    None stands for a group that says more of its tasks than their names.
    """
    tasks: dict[str, Path] = {}
    groups: dict[str, list[str] | None] = {}
    roots = importlib.util.find_spec("lm_eval").submodule_search_locations
    files = [f"{folder}/{file}" for root in roots for folder, _, files in os.walk(f"{root}/tasks") for file in files]
    for path in sorted(path for path in files if path.endswith(".yaml")):
        entry = _entry(path)
        names = _names(entry.get("task"))
        for name in _names(entry.get("group")):
            groups[name] = names or None
        if "group" not in entry and len(names) == 1:
            tasks.setdefault(names[0], Path(path))
            for tag in _names(_inherited_tag(path)):
                groups.setdefault(tag, []).extend(names)
    return tasks, groups


@functools.cache
def _entry(path: str) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            return {match[1].decode(): match[2].decode() for match in ENTRY.finditer(file.read())}
    except OSError:
        return {}


def _inherited_tag(path: str) -> str | None:
    """The tags of a task, which may be those of a file that it includes."""
    entry = _entry(path)
    if "tag" in entry or "include" not in entry:
        return entry.get("tag")
    return _inherited_tag(os.path.join(os.path.dirname(path), entry["include"].strip(" \"'")))


def _names(text: str | None) -> list[str]:
    """The names in a scalar or a list of YAML; none if there is anything else in it."""
    items = [item.partition("#")[0].strip(" -\"'[]") for line in (text or "").splitlines() for item in line.split(",")]
    items = [item for item in items if item]
    return items if all(NAME.fullmatch(item) for item in items) else []
