"""The filter for system calls: what it lets through, on both kinds of processors and inside the sandbox."""

import os
import sys

import pytest

from eval.sandbox import find_isolation, run_untrusted
from eval.sandboxing.system_calls import ALLOW, ALLOWED, ERROR, KILL_PROCESS, MACHINES, make_filter

ISOLATION = find_isolation()
needs_filter = pytest.mark.skipif(bool(ISOLATION.no_filter), reason=f"no filter: {ISOLATION.no_filter}")
EPERM, ENOSYS, ENETUNREACH = 1, 38, 101

# name: numbers on x86-64 and aarch64, of calls that a program has no business with.
REFUSED = {
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "clone3": (435, 435),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "connect": (42, 203),
    "bind": (49, 200),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "quotactl": (179, 60),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "settimeofday": (170, 170),
    "clock_settime": (227, 112),
    "sethostname": (170, 161),
    "syslog": (103, 116),
    "acct": (163, 89),
    "personality": (135, 92),
    "rt_sigqueueinfo": (129, 138),
    "sched_setaffinity": (203, 122),
    "vmsplice": (278, 75),
    "landlock_create_ruleset": (444, 444),
}
COLUMN = {"x86_64": 0, "aarch64": 1}


def numbers(machine: str) -> dict[str, int]:
    """The numbers of the calls on the list."""
    rows = [row.split(":") for row in ALLOWED.split()]
    place = COLUMN[machine] + 1
    return {name: int(found[place - 1]) for name, *found in rows if len(found) >= place}


def run_filter(machine: str, number: int, *arguments: int, architecture: int | None = None, **settings) -> int:
    """What the kernel would do with a call: the filter's result, by a machine for the four instructions it has."""
    words = {0: number, 4: MACHINES[machine][0] if architecture is None else architecture}
    for i, argument in enumerate([*arguments, *[0] * (6 - len(arguments))]):
        words[16 + 8 * i], words[20 + 8 * i] = argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF
    program, place, word = make_filter(machine, **settings), 0, 0
    assert len(program) < 4096
    while True:
        code, if_true, if_false, constant = program[place]
        place += 1
        if code == 0x20:
            word = words[constant]
        elif code == 0x06:
            return constant
        else:
            place += if_true if (word == constant if code == 0x15 else word & constant) else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_what_python_needs_is_allowed_and_nothing_else(machine):
    known = numbers(machine)
    assert set(known) >= {"read", "write", "openat", "mmap", "futex", "clone", "execve", "exit_group", "getrandom"}
    arguments = {"socket": (1, 1), "socketpair": (1, 1), "ioctl": (1, 0x5401), "prctl": (15,), "kill": (7, 9)}
    for name, number in known.items():
        expected = ERROR | ENETUNREACH if name == "socket" else ALLOW
        assert run_filter(machine, number, *arguments.get(name, ())) == expected, name
    for number in {*range(600), 2**30, 2**30 + 1, 2**32 - 1} - set(known.values()):
        assert run_filter(machine, number) == ERROR | ENOSYS, number
    others = {name: found[COLUMN[machine]] for name, found in REFUSED.items()}
    assert not set(others.values()) & set(known.values())
    assert run_filter(machine, known["read"], architecture=0x40000003) == KILL_PROCESS  # 32 bits


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "name, arguments, error",
    [
        ("clone", (0x10000000 | 17,), EPERM),  # a user namespace
        ("clone", (0x00020000 | 17,), EPERM),
        ("clone", (17,), None),
        ("clone", (0x3D0F00,), None),  # a thread
        ("socket", (1,), ENETUNREACH),
        ("socket", (2,), ENETUNREACH),
        ("socket", (16,), ENETUNREACH),  # netlink
        ("socket", (40,), ENETUNREACH),  # vsock
        ("socket", (38,), ENETUNREACH),  # kernel cryptography
        ("socketpair", (1, 1), None),
        ("socketpair", (1, 1 | 0o2000000), None),
        ("socketpair", (1, 2), EPERM),  # of datagrams, which can be sent elsewhere
        ("socketpair", (16, 1), 97),
        ("prctl", (1, 0), 22),  # the death signal
        ("prctl", (4, 0), 22),
        ("prctl", (22, 2), 22),
        ("prctl", (15, 0), None),
        ("fcntl", (3, 8, 1), EPERM),
        ("fcntl", (3, 10, 9), EPERM),
        ("fcntl", (3, 15, 1), EPERM),
        ("fcntl", (3, 2, 1), None),
        ("ioctl", (0, 0x5412), 25),  # characters for a terminal
        ("ioctl", (0, 0x8901), 25),
        ("ioctl", (0, 0x5413), None),
        ("prlimit64", (0,), None),
        ("prlimit64", (1,), EPERM),
        ("mmap", (0, 4096, 3, 0x22), None),
        ("mmap", (0, 4096, 3, 0x40022), 12),
    ],
)
def test_some_calls_depend_on_their_arguments(machine, name, arguments, error):
    assert run_filter(machine, numbers(machine)[name], *arguments) == (ALLOW if error is None else ERROR | error)


@pytest.mark.parametrize("machine", MACHINES)
def test_signals_can_be_kept_to_oneself(machine):
    known = numbers(machine)
    for name in ("kill", "tkill", "tgkill"):
        assert run_filter(machine, known[name], 7, 9) == ALLOW
        assert run_filter(machine, known[name], 7, 9, signals_to=7) == ALLOW
        for other in (1, 8, 2**32 - 1, 2**32 - 7):
            assert run_filter(machine, known[name], other, 9, signals_to=7) == ERROR | EPERM


@needs_filter
def test_refused_calls_fail_inside():
    column = COLUMN[os.uname().machine]
    calls = {name: found[column] for name, found in REFUSED.items()}
    program = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {calls}.items():
    if libc.syscall(number, *[ctypes.c_long(0)] * 6) != -1 or ctypes.get_errno() != errno.ENOSYS:
        raise SystemExit(name + ' was not refused')
"""
    verdict = run_untrusted(program)
    assert verdict.passed, verdict


RING = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in ((250, 0, -3, 1), (250, 0, -4, 1), (250, 1, 0), (250, 10, -3, b"user", b"setflow", 0),
             (249, b"user", b"setflow", None, 0), (248, b"user", b"setflow", b"x", 1, -2)):
    if libc.syscall(*call) >= 0:
        raise SystemExit(f'keyring reached by {call}')
"""


@needs_filter
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="numbers are those of x86-64")
def test_no_keyring_is_reachable():
    verdict = run_untrusted(RING)
    assert verdict.passed, verdict


@needs_filter
@pytest.mark.parametrize("family", ["AF_VSOCK", "AF_NETLINK", "AF_PACKET", "AF_ALG", "AF_INET", "AF_INET6", "AF_UNIX"])
def test_no_socket_can_be_opened(family):
    program = f"""
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
    try: socket.socket(getattr(socket, {family!r}, 40), kind)
    except OSError: continue
    raise SystemExit('open')
"""
    assert run_untrusted(program).passed


HONEST = {
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()",
    "a pool": "from concurrent.futures import ThreadPoolExecutor\nassert list(ThreadPoolExecutor(2).map(abs, [-1])) == [1]",
    "a loop of events": "import asyncio\nasync def f(): await asyncio.sleep(0)\nasyncio.run(f())",
    "a child": "import subprocess, sys\nassert subprocess.run([sys.executable, '-c', 'exit(3)']).returncode == 3",
    "a fork": "import os\npid = os.fork()\nif not pid: os._exit(4)\n"
    "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4",
    "files": "import tempfile, shutil, os, glob\nwith tempfile.TemporaryDirectory() as d:\n  open(d + '/a', 'w').write('x')\n"
    "  shutil.copytree(d, d + '/b'); shutil.copy2(d + '/a', d + '/c'); os.rename(d + '/c', d + '/e')\n"
    "  assert len(glob.glob(d + '/*')) == 3",
    "an alarm": "import signal, time\nsignal.signal(14, lambda *a: None)\nsignal.setitimer(0, 0.01)\nsignal.pause()",
    "a signal to oneself": "import signal\nsignal.signal(10, lambda *a: None)\nsignal.raise_signal(10)",
    "memory maps": "import mmap\nm = mmap.mmap(-1, 4096)\nm[:2] = b'ab'\nassert m[1] == 98",
    "a database": "import sqlite3\nassert sqlite3.connect('x.db').execute('select 1+1').fetchone() == (2,)",
    "the clock": "import time, datetime\ntime.sleep(0.001); datetime.datetime.now(); time.process_time(); time.monotonic()",
    "chance": "import random, secrets, uuid\nrandom.random(); secrets.token_hex(); uuid.uuid4()",
    "the system": "import os, platform\nplatform.platform(); os.cpu_count(); os.uname(); os.sched_getaffinity(0)",
    "its limits": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); resource.getrusage(0)",
}


@needs_filter
@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_do_not_notice(name):
    verdict = run_untrusted(HONEST[name])
    assert verdict.passed, verdict


@needs_filter
def test_numpy_does_not_notice():
    pytest.importorskip("numpy")
    program = "import numpy as np\na = np.random.rand(200, 200)\nassert np.allclose(np.linalg.inv(a) @ a, np.eye(200))"
    verdict = run_untrusted(program, isolation=ISOLATION)
    assert verdict.passed, verdict
