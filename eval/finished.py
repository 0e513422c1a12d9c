"""Finished requests on disk, so that a run that was killed goes on where it was."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from decoding.jsonl import read_jsonl


def request_key(*parts: Any) -> str:
    """A hash of everything that decides a request's answer; ``parts`` must be JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def number_repeats(keys: list[str]) -> list[str]:
    """Make equal keys different, for requests that are drawn several times.

    >>> number_repeats(["a", "b", "a"])
    ['a', 'b', 'a#1']
    """
    seen: Counter[str] = Counter()
    numbered = []
    for key in keys:
        numbered.append(f"{key}#{seen[key]}" if seen[key] else key)
        seen[key] += 1
    return numbered


class Finished:
    """A JSONL file of records by key. Without a path it keeps them in memory only.

    A line is written whole as soon as its request is finished; a line that was cut by a kill is skipped.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else None
        self.records: dict[str, dict] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = True
        if self.path.exists():
            for _, record in read_jsonl("finished", self.path, skip_broken=True):
                if isinstance(record, dict) and "key" in record:
                    self.records[record["key"]] = record
            whole = self.path.read_bytes()[-1:] in (b"", b"\n")
        if not whole:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> dict:
        return self.records[key]

    def add(self, records: list[dict]) -> None:
        """Keep ``records``, each with its ``key``."""
        self.records.update((record["key"], record) for record in records)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
