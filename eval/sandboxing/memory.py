"""One limit on the memory of all processes of a sandbox: a control group (version 1 or 2), where one may be made."""

import functools
import itertools
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "setflow-sandbox"
KERNEL_MB = 16  # what the kernel keeps for its processes counts too
_numbers = itertools.count()


@dataclass(frozen=True)
class Place:
    """A folder of control groups in which we may make others; ``version`` 1 or 2."""

    folder: Path
    version: int


class MemoryGroup:
    """A control group for one run with a limit in ``megabytes``. Raises OSError if it cannot be made."""

    def __init__(self, place: Place, megabytes: int):
        self.version = place.version
        self.folder = place.folder / f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.folder.mkdir()
        size = str((megabytes + KERNEL_MB) * 2**20)
        try:
            if self.version == 1:
                self._write("memory.limit_in_bytes", size)
                with suppress(OSError):  # kernels that do not count swap
                    self._write("memory.memsw.limit_in_bytes", size)
            else:
                self._write("memory.max", size)
                self._write("memory.oom.group", "1")
                with suppress(OSError):
                    self._write("memory.swap.max", "0")
        except OSError:
            self.remove()
            raise

    def add(self, pid: int) -> None:
        self._write("cgroup.procs", str(pid))

    def exceeded(self) -> bool:
        """Whether the kernel has killed a process for want of memory."""
        lines = (self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")).read_text()
        return any(line.split()[0] == "oom_kill" and int(line.split()[1]) for line in lines.splitlines())

    def remove(self) -> None:
        """Remove the group; its processes must have ended."""
        for _ in range(100):
            try:
                return self.folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # the kernel is still burying them
                time.sleep(0.01)

    def _write(self, name: str, value: str) -> None:
        # Not by way of a buffer, so that an error is raised here.
        file = os.open(self.folder / name, os.O_WRONLY)
        try:
            os.write(file, value.encode())
        finally:
            os.close(file)


@functools.cache
def find_place() -> Place | str:
    """Where control groups may be made, or why not; what runs that were killed have left there is removed."""
    if sys.platform != "linux":
        return f"{sys.platform} has no control groups"
    reason = "no control group for memory"
    for place in _candidates():
        try:
            group = MemoryGroup(place, 64)
        except OSError as error:
            reason = f"{place.folder}: {error.strerror}"
            continue
        # Whether processes may be moved there is another question.
        idle = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
        try:
            group.add(idle.pid)
            _remove_left(place.folder)
            return place
        except OSError as error:
            reason = f"{place.folder}: {error.strerror}"
        finally:
            idle.kill()
            idle.communicate()
            group.remove()
    return reason


def _candidates() -> list[Place]:
    """Our own control group and, in version 2, those around it that hand memory limits on to their children."""
    own = {}  # controllers: path
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    places = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where, _, what = line.partition(" - ")
        root, mount = where.split()[3:5]
        kind, _, options = what.split(" ", 2)
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        wanted = [path for names, path in own.items() if ("memory" in names.split(",") if version == 1 else not names)]
        if not version or not wanted or (version == 1 and "memory" not in options.split(",")):
            continue
        inside = os.path.relpath(wanted[0], root)
        folder = Path(mount) if inside.startswith("..") else Path(mount, inside)
        if version == 1:
            places.append(Place(folder, 1))
        while version == 2 and folder.is_relative_to(mount):
            with suppress(OSError):
                if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                    places.append(Place(folder, 2))
            folder = folder.parent
    return places


def _remove_left(folder: Path) -> None:
    for left in folder.glob(f"{PREFIX}-*"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            with suppress(OSError):
                left.rmdir()
