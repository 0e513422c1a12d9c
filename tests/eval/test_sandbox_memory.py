"""One limit on the memory of all processes of a program, by a control group or, where none may be made, by looking."""

import os
from pathlib import Path

import pytest

from eval.sandbox import Isolation, Limits, find_isolation, run_untrusted
from eval.sandboxing.memory import PREFIX, MemoryGroup, Place, find_place
from eval.sandboxing.processes import descendants, memory_of

FOUND = find_isolation()
LIMITS = Limits(memory_mb=192, files_mb=16, seconds=20, cpu_seconds=20)


def guarded(kind: str) -> Isolation:
    """The isolation that we have, with a control group or with a look at /proc now and then."""
    if kind == "group" and FOUND.no_group:
        pytest.skip(f"no control group: {FOUND.no_group}")
    if kind == "watched" and not os.path.isdir("/proc/self"):
        pytest.skip("no /proc")
    return Isolation(FOUND.namespaces, FOUND.reason, FOUND.no_filter, "" if kind == "group" else "switched off")


# Each takes 300 MB, 100 at a time, and holds them for a while.
HOGS = {
    "children": """
import os, time
for i in range(3):
    if os.fork() == 0:
        x = bytearray(b'x') * (100 * 2 ** 20)
        time.sleep(5)
        os._exit(0)
time.sleep(1)
""",
    "a chain of children": """
import os, time
for i in range(3):
    x = bytearray(b'x') * (100 * 2 ** 20)
    if os.fork(): time.sleep(2); break
    del x
""",
    "children of children, without a parent": """
import os, time
for i in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            x = bytearray(b'x') * (100 * 2 ** 20)
            time.sleep(5)
        os._exit(0)
time.sleep(1)
""",
    "shared maps": """
import mmap, os, time
for i in range(3):
    if os.fork() == 0:
        m = mmap.mmap(-1, 100 * 2 ** 20)
        for place in range(0, len(m), 4096): m[place] = 1
        time.sleep(5)
        os._exit(0)
time.sleep(1)
""",
}


@pytest.mark.parametrize("kind", ["group", "watched"])
@pytest.mark.parametrize("hog", HOGS)
def test_the_limit_is_one_for_all_processes(hog, kind):
    verdict = run_untrusted(HOGS[hog], LIMITS, isolation=guarded(kind))
    assert (verdict.passed, verdict.status) == (False, "memory"), verdict
    assert verdict.detail == "more than 192 MB of memory"


@pytest.mark.parametrize("kind", ["group", "watched"])
def test_what_several_share_counts_once(kind):
    program = """
import os, time
x = bytearray(b'x') * (90 * 2 ** 20)
children = []
for i in range(4):
    if not (pid := os.fork()): time.sleep(0.5); os._exit(0)
    children.append(pid)
for pid in children: os.waitpid(pid, 0)
"""
    verdict = run_untrusted(program, LIMITS, isolation=guarded(kind))
    assert verdict.passed, verdict


# Memory that is in no process's address space.
HIDDEN = {
    "memory files": "import os\nfds = [os.memfd_create('x') for i in range(8)]\nfor fd in fds: os.truncate(fd, 2 ** 25)\n"
    "for fd in fds:\n  for i in range(32): os.write(fd, bytes(2 ** 20))",
    "shared memory of System V": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
for i in range(8):
    number = libc.shmget(0, 2 ** 25, 0o1600)
    if number < 0: raise OSError(ctypes.get_errno(), 'shmget')
    address = libc.shmat(number, None, 0)
    ctypes.memset(address, 1, 2 ** 25)
    libc.shmdt(ctypes.c_void_p(address))
""",
    "queues of messages": "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "if libc.msgget(0, 0o1600) < 0: raise OSError(ctypes.get_errno(), 'msgget')",
    "files": "for i in range(8): open(f'{i}', 'wb').write(bytes(2 ** 24 - 1))",
}


@pytest.mark.skipif(bool(FOUND.missing), reason=f"a weak sandbox: {FOUND.missing}")
@pytest.mark.parametrize("kind", ["group", "watched"])
@pytest.mark.parametrize("name", HIDDEN)
def test_memory_outside_of_processes_is_refused(name, kind):
    verdict = run_untrusted(HIDDEN[name], LIMITS, isolation=guarded(kind))
    assert verdict.status in ("failed", "memory"), verdict


@pytest.mark.skipif(bool(FOUND.no_group), reason=f"no control group: {FOUND.no_group}")
def test_no_group_remains():
    for program in ("pass", "assert 0", "import os\nos.fork()", HOGS["children"]):
        run_untrusted(program, LIMITS)
    assert not list(find_place().folder.glob(f"{PREFIX}-{os.getpid()}-*"))
    left = find_place().folder / f"{PREFIX}-999999999-0"  # of a run that was killed
    left.mkdir()
    find_place.cache_clear()
    assert isinstance(find_place(), Place) and not left.exists()


def test_a_group_that_cannot_be_made_is_an_error(tmp_path):
    with pytest.raises(OSError):
        MemoryGroup(Place(tmp_path, 2), 64)
    assert not list(tmp_path.iterdir()), "nothing is left of it"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_descendants_and_their_memory_are_found():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        grandchild = os.fork()
        if grandchild:
            os.write(write, str(grandchild).encode())
            os.waitpid(grandchild, 0)
        else:
            os.read(read, 0)
            hoard = bytearray(b"x") * (32 * 2**20)
            os.write(write, b" ready")
            import time

            time.sleep(60)
            del hoard
        os._exit(0)
    try:
        said = b""
        while b"ready" not in said or len(said.split()) < 2:
            said += os.read(read, 100)
        grandchild = int(said.replace(b"ready", b""))
        found = {process.pid: process for process in descendants(os.getpid())}
        assert {child, grandchild} <= set(found)
        assert memory_of({found[grandchild]}, 2**40) >= 32 * 2**20
        assert 32 * 2**20 <= memory_of({found[grandchild]}, 0) <= memory_of({found[grandchild]}, 2**40) + 2**20
    finally:
        for pid in (grandchild, child):
            os.kill(pid, 9)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    assert not {child, grandchild} & {process.pid for process in descendants(os.getpid())}
    assert memory_of({found[child]}, 0) == 0
    assert not Path(f"/proc/{child}").exists()
