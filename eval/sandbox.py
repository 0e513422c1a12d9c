"""Run Python code that nobody has read.

Every program gets a process of its own with limits on time, memory, processes, files and output, an empty environment
and an empty folder that vanishes afterwards. On Linux it also gets namespaces of its own: no network, no sight of other
processes, a file system with nothing but the interpreter and its packages (read-only), and no way for a child to
outlive it. Where the kernel refuses that, ``find_isolation`` says why, and the weaker form remains: the limits, the
folder, the end of the whole process group and, for root, a change to the user "nobody"; the network and files are open.

This protects the machine from the program. It does not protect the verdict: a program that sets out to be judged
"passed" runs in the same interpreter as the judge.
"""

import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from decoding.inputs.checks import check_count, check_range
from eval.sandbox_child import INSIDE, NOBODY

CHILD = Path(__file__).with_name("sandbox_child.py")
STARTUP_SECONDS = 30.0
OUTPUT_TAIL = 2000  # bytes
PIPE_LIMIT = 2**16  # bytes of reports; an honest run sends about 500
MARK = "SETFLOW_SANDBOX"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    seconds: wall clock, from the program's first statement.
    cpu_seconds, memory_mb: of each process; memory is address space.
    processes: processes and threads together. Linux counts them per sandbox from 5.14 on, per user before.
    files_mb: size of each file and, with namespaces, of all together.
    output_mb: written to stdout and stderr.
    """

    seconds: float = 3.0
    cpu_seconds: int = 4
    memory_mb: int = 1024
    processes: int = 16
    files_mb: int = 64
    output_mb: int = 16

    def __post_init__(self) -> None:
        check_range("seconds", self.seconds, 0, include_low=False)
        for field in ("cpu_seconds", "memory_mb", "processes", "files_mb", "output_mb"):
            check_count(field, getattr(self, field))


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    passed: it ran to its end without an exception.
    status: "passed", "failed" (an exception, SystemExit included), "timeout", "output" (too much of it) or "died" (it
        ended without a word: os._exit, a signal).
    detail: the exception or what else is known. output: the last bytes of stdout and stderr, as text.
    seconds: wall clock from the first statement.
    """

    passed: bool
    status: str
    detail: str
    output: str
    seconds: float


@dataclass(frozen=True)
class Isolation:
    """``namespaces``: whether programs get Linux namespaces of their own; ``reason``: why not."""

    namespaces: bool
    reason: str = ""


@functools.cache
def find_isolation() -> Isolation:
    """Try once what this machine allows."""
    if sys.platform != "linux":
        return Isolation(False, f"{sys.platform} has no namespaces")
    try:
        verdict = run_untrusted("import ctypes, hashlib, re", isolation=Isolation(True))
    except RuntimeError as error:
        return Isolation(False, str(error))
    return Isolation(verdict.passed, verdict.detail)


def run_untrusted(program: str, limits: Limits | None = None, *, isolation: Isolation | None = None) -> Verdict:
    """Execute ``program`` and wait for its end. Safe to call from several threads.

    Raises RuntimeError if the sandbox itself cannot be set up.

    >>> run_untrusted("assert 1 + 1 == 3").detail
    'AssertionError: '
    """
    limits = limits or Limits()
    isolation = isolation or find_isolation()
    mark = secrets.token_hex(8)
    folder = None if isolation.namespaces else _make_folder()
    reports, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", str(CHILD), str(write_end), str(int(isolation.namespaces))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[write_end],
        env=_environment(folder or "/tmp", mark),
        cwd=folder or "/",
        start_new_session=True,
    )
    os.close(write_end)
    try:
        return _Run(process, reports, limits).follow(program, isolation.namespaces)
    finally:
        os.close(reports)
        _end(process)
        if folder is not None:
            _kill_marked(mark)
            _remove(folder)


class _Over(Exception):
    """The program is over before it reported anything: (status, detail)."""


class _Run:
    """One run seen from outside: reads the child's reports, drains the output and keeps the time."""

    def __init__(self, process: subprocess.Popen, reports: int, limits: Limits):
        self.process, self.reports, self.limits = process, reports, limits
        self.secret = secrets.token_hex(16)
        self.lines = bytearray()  # reports not yet taken
        self.reported = self.printed = 0  # bytes so far
        self.tail = b""  # the end of the output
        self.selector = selectors.DefaultSelector()
        for stream in (reports, process.stdout):
            os.set_blocking(stream if isinstance(stream, int) else stream.fileno(), False)
            self.selector.register(stream, selectors.EVENT_READ)

    def follow(self, program: str, namespaces: bool) -> Verdict:
        with self.selector:
            try:
                self._start(program, namespaces)
            except _Over as over:
                said = self.tail.decode(errors="replace")
                raise RuntimeError(f"the sandbox did not start: {over.args[1]} {said}") from None
            start = time.monotonic()
            told = None  # what the program's own process says; it may never come, but it is not taken back
            try:
                while (event := self._report(start + self.limits.seconds, signed=True))["event"] != "exited":
                    told = event["status"], event["detail"]
                status, detail = told or self._unexplained(event)
            except _Over as over:
                status, detail = told or over.args
            seconds = time.monotonic() - start
            with suppress(_Over):  # what is still in the pipe
                while self._read(self.process.stdout):
                    pass
        return Verdict(status == "passed", status, detail, self.tail.decode(errors="replace"), seconds)

    def _start(self, program: str, namespaces: bool) -> None:
        """Map the sandbox's user ids, hand over the program and wait until it begins."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while (event := self._report(deadline))["event"] != "started":
            if event["event"] == "refused":
                raise RuntimeError(event["reason"])
            if namespaces:
                _map_ids(self.process.pid)
            packages = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
            request = {
                "program": program,
                "secret": self.secret,
                "limits": asdict(self.limits),
                "packages": packages,
                "readable": [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), *packages],
            }
            with suppress(BrokenPipeError):  # the next report says why
                self.process.stdin.write(json.dumps(request).encode())
                self.process.stdin.close()

    def _report(self, deadline: float, signed: bool = False) -> dict:
        """The next report before ``deadline``, else raises _Over; ``signed``: skip those without our secret."""
        while True:
            while b"\n" not in self.lines:
                ready = self.selector.select(max(0.0, deadline - time.monotonic()))
                if not ready or time.monotonic() > deadline:
                    raise _Over("timeout", f"more than {self.limits.seconds:g} s")
                for key, _ in ready:
                    if not self._read(key.fileobj):
                        self.selector.unregister(key.fileobj)
                        if key.fileobj == self.reports:
                            raise _Over("died", "everything in the sandbox was killed")
            line, _, self.lines = self.lines.partition(b"\n")
            try:
                event = json.loads(line)
                if not signed or event["secret"] == self.secret:
                    return event
            except (ValueError, TypeError, KeyError):
                continue  # not ours: the program wrote into the pipe

    def _read(self, stream) -> int:
        """Take what ``stream`` holds; returns the number of bytes, 0 at its end or when it is empty."""
        try:
            data = os.read(stream if isinstance(stream, int) else stream.fileno(), 2**16)
        except BlockingIOError:
            return 0
        if stream == self.reports:
            self.lines += data
            self.reported += len(data)
        else:
            self.tail = (self.tail + data)[-OUTPUT_TAIL:]
            self.printed += len(data)
        if self.printed > self.limits.output_mb * 2**20 or self.reported > PIPE_LIMIT:
            raise _Over("output", f"too much output; {self.limits.output_mb} MB are allowed")
        return len(data)

    def _unexplained(self, exited: dict) -> tuple[str, str]:
        code = exited["code"]
        # The kernel's limit counts in ticks and may strike a little early.
        if code == -signal.SIGKILL and exited["cpu_seconds"] > self.limits.cpu_seconds - 0.1:
            return "timeout", f"more than {self.limits.cpu_seconds} s of processor time"
        return "died", f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _map_ids(pid: int) -> None:
    """Give the user namespace of ``pid`` its ids: an ordinary user, who outside is us or, if we are root, nobody.

    Root also maps itself, since only root can show the sandbox an interpreter that lies in root's home.
    """
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if kind == "gid":
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        lines = f"0 0 1\n{INSIDE} {NOBODY} 1\n" if os.geteuid() == 0 else f"{INSIDE} {own} 1\n"
        Path(f"/proc/{pid}/{kind}_map").write_text(lines)


def _environment(folder: str, mark: str) -> dict[str, str]:
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    places = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "TMPDIR": folder}
    return {**places, **threads, "LANG": "C.UTF-8", MARK: mark}


def _make_folder() -> str:
    folder = tempfile.mkdtemp(prefix="setflow-sandbox-")
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    return folder


def _end(process: subprocess.Popen) -> None:
    """End a run: ask the child to kill the program's process and to wait for its end, else kill both."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):
            stream.close()


def _kill_marked(mark: str) -> None:
    """Kill what has left the process group; without namespaces only the environment tells whose it is."""
    wanted = f"{MARK}={mark}".encode()
    for _ in range(100):  # a process may fork while we look
        found = False
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if wanted in environ.read_bytes().split(b"\0"):
                    found = True
                    os.kill(int(environ.parent.name), signal.SIGKILL)
        if not found:
            return


def _remove(folder: str) -> None:
    os.chmod(folder, 0o700)
    for path, names, _ in os.walk(folder):  # the program may have locked its folders
        for name in names:
            if not os.path.islink(child := os.path.join(path, name)):
                os.chmod(child, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
