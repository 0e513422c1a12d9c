"""Processes seen from outside, by /proc: who descends from whom, how much memory they hold, and their end."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    """One process; ``started`` (clock ticks) tells it from a later one with the same id."""

    pid: int
    started: int


def read_stat(pid: int) -> tuple[str, int, Process] | None:
    """State, parent's id and process, or None if there is no such process (any more)."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), Process(pid, int(fields[19]))


def descendants(root: int) -> set[Process]:
    """The living descendants of the process ``root``; none where there is no /proc."""
    children: dict[int, list[Process]] = {}
    for folder in PROC.glob("[0-9]*"):
        if stat := read_stat(int(folder.name)):
            children.setdefault(stat[1], []).append(stat[2])
    found: set[Process] = set()
    wave = [root]
    while wave:
        born = [process for parent in wave for process in children.get(parent, ())]
        found.update(born)
        wave = [process.pid for process in born]
    return set(filter(lives, found))


def lives(process: Process) -> bool:
    """Whether it is there and no zombie."""
    found = read_stat(process.pid)
    return found is not None and found[2] == process and found[0] not in "ZX"


def carriers(mark: str) -> set[Process]:
    """The living processes with ``mark``, "NAME=value", in their environment, as far as we may see it."""
    found = set()
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(read_stat(int(folder.name)))
    return set(filter(lives, (process for _, _, process in filter(None, found))))


def kill_all(root: int, mark: str, known: set[Process]) -> None:
    """Kill the descendants of ``root``, those of ``known`` that still live and those that carry ``mark``."""
    for _ in range(100):  # a process may fork while we look
        victims = descendants(root) | carriers(mark) | set(filter(lives, known))
        victims = {process for process in victims if process.pid != root}
        if not victims:
            return
        for process in victims:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)


def memory_of(processes: set[Process], limit: int) -> int:
    """Bytes that ``processes`` hold; what several share counts once if otherwise the sum is above ``limit``."""
    resident = sum(_read_number(process.pid, "statm", 1) * PAGE for process in processes)
    return resident if resident <= limit else sum(_proportional(process.pid) for process in processes)


def _proportional(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except OSError:  # gone, or not ours to look into
        return _read_number(pid, "statm", 1) * PAGE


def _read_number(pid: int, name: str, column: int) -> int:
    try:
        return int((PROC / str(pid) / name).read_text().split()[column])
    except (OSError, IndexError):
        return 0
