"""Finished requests on disk, so that a run that was killed goes on where it was."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from decoding.inputs.jsonl import read_jsonl
from eval.files import SoleWriter


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


def read_records(path: Path) -> list[dict]:
    """The whole records with a ``key`` in a JSONL file, of each key the last; none if there is no such file.

    What a kill or a full disk left of a line is passed over.
    """
    if not path.exists():
        return []
    records = [record for _, record in read_jsonl("results", path, skip_broken=True) if isinstance(record, dict)]
    return list({record["key"]: record for record in records if isinstance(record.get("key"), str)}.values())


class Finished:
    """A JSONL file of records by key, each written as soon as it is there. Without a path they are kept in memory only.

    Raises ValueError while another run writes the file.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = Path(path) if path else None
        self._sole = SoleWriter(self.path) if path else None
        self.records: dict[str, dict] = {}
        with self.writing():
            pass

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Meanwhile no other run writes the file; what was written before is read.

        The processes of one run share the file, each with records of its own, and the first has the lock for all.
        """
        first = os.environ.get("RANK", "0") == "0"
        with self._sole.writing() if self._sole and first else nullcontext():
            if self.path is not None:
                self.records |= {record["key"]: record for record in read_records(self.path)}
            yield

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> dict:
        return self.records[key]

    def add(self, records: list[dict]) -> None:
        """Keep ``records``, each with its ``key``."""
        self.records.update((record["key"], record) for record in records)
        if self.path is not None:
            with self.path.open("ab+") as file:
                if file.tell() and not _ends_a_line(file):
                    file.write(b"\n")  # behind what a kill has left
                file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
