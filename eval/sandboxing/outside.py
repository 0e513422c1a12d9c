"""One run seen from outside: starts the supervisor, reads its reports, drains the output, keeps time and ends it all."""

import json
import os
import selectors
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from eval.sandboxing.child import INSIDE, NOBODY
from eval.sandboxing.memory import MemoryGroup
from eval.sandboxing.processes import Process, descendants, kill_all, memory_of

ROOT = Path(__file__).parents[2]
CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from eval.sandboxing.child import main; main()"
STARTUP_SECONDS = 30.0
WATCH_SECONDS = 0.05
OUTPUT_TAIL = 2000  # bytes
PIPE_LIMIT = 2**16  # bytes of reports; an honest run sends about 500
# What a report holds besides "event".
REPORTS: dict[str, dict[str, tuple[type, ...]]] = {
    "unshared": {},
    "started": {"judge": (int,), "answer": (int,)},
    "refused": {"reason": (str,)},
    "verdict": {"status": (str,), "detail": (str,)},
    "exited": {"name": (str,), "code": (int,), "cpu_seconds": (int, float)},
}


class Over(Exception):
    """The run is over without a verdict: (status, detail)."""


class Run:
    """Use as a context: at its end nothing is left of the run."""

    def __init__(
        self, limits: dict[str, Any], mark: str, group: MemoryGroup | None, *, namespaces: bool, filtered: bool
    ):
        """limits: the fields of ``Limits``. mark: NAME=VALUE for the environment. group: where memory is counted."""
        self.limits, self.mark, self.group, self.namespaces = limits, mark, group, namespaces
        self.watched = group is None or not namespaces
        self.seen: set[Process] = set()  # descendants, where no namespace holds them together
        self.judge = 0  # the process that is none of the program's
        self.lines = bytearray()  # reports not yet taken
        self.reported = self.printed = 0  # bytes so far
        self.tail = b""  # the end of the output
        packages = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
        self.settings = {
            "limits": limits,
            "namespaces": namespaces,
            "filter": filtered,
            "packages": packages,
            "readable": [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), *packages],
        }

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            folder = None
            if not self.namespaces:
                folder = _make_folder()
                stack.callback(_remove, folder)
            self.reports, write_end = os.pipe()
            stack.callback(os.close, self.reports)
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-X", "utf8", "-c", CHILD]
                    + [str(ROOT), str(write_end), json.dumps(self.settings)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[write_end],
                    env=_environment(folder or "/tmp", self.mark),
                    cwd=folder or "/",
                    start_new_session=True,
                )
            finally:
                os.close(write_end)
            stack.callback(self._end)
            self.selector = stack.enter_context(selectors.DefaultSelector())
            for stream in (self.reports, self.process.stdout):
                os.set_blocking(stream if isinstance(stream, int) else stream.fileno(), False)
                self.selector.register(stream, selectors.EVENT_READ)
            self._start()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def follow(self, request: dict[str, str]) -> tuple[str, str, str, float]:
        """Hand over the request of judge.py and wait: status, detail, the end of the output, seconds."""
        start = time.monotonic()
        try:
            self._send(json.dumps(request).encode())
            self.process.stdin.close()
            status, detail = self._wait(start + self.limits["seconds"])
        except BrokenPipeError:
            status, detail = "died", "the judge did not take the program"
        except Over as over:
            status, detail = over.args
        seconds = time.monotonic() - start
        with suppress(Over):  # what is still in the pipe
            while self._read(self.process.stdout):
                pass
        return status, detail.encode(errors="backslashreplace").decode(), self.tail.decode(errors="replace"), seconds

    def _start(self) -> None:
        """Map the sandbox's user ids, wait until the program may begin and put its process into its group."""
        deadline = time.monotonic() + STARTUP_SECONDS
        try:
            while (event := self._report(deadline))["event"] != "started":
                if event["event"] == "refused":
                    raise RuntimeError(event["reason"])
                if self.namespaces:
                    _map_ids(self.process.pid)
                self._send(b"\n")
            self.judge = event["judge"]
            if self.group is not None:
                self.group.add(event["answer"])
        except OSError as error:
            raise RuntimeError(f"the sandbox did not start: {error}") from None
        except Over as over:
            said = self.tail.decode(errors="replace")
            raise RuntimeError(f"the sandbox did not start: {over.args[1]} {said}") from None

    def _send(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def _wait(self, deadline: float) -> tuple[str, str]:
        """Status and detail: what the judge says or, if it cannot say anything, how the processes ended."""
        verdict, ended = None, {}
        while True:
            event = self._report(deadline)
            if event["event"] == "verdict":
                verdict = event["status"], event["detail"]
                if verdict[0] in ("passed", "failed"):
                    return verdict
            elif event["event"] == "exited":
                ended[event["name"]] = event["code"], event["cpu_seconds"]
            last = "answer" if verdict else "judge"
            if last in ended:
                if verdict and verdict[0] == "odd" and ended[last][0] == 0:
                    return "failed", verdict[1]
                return explain_end(*ended[last], self.limits["cpu_seconds"])

    def _report(self, deadline: float) -> dict[str, Any]:
        """The next report before ``deadline``; raises Over if there is none."""
        while b"\n" not in self.lines:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Over("timeout", f"more than {self.limits['seconds']:g} s")
            for key, _ in self.selector.select(min(left, WATCH_SECONDS) if self.watched else left):
                if not self._read(key.fileobj):
                    self.selector.unregister(key.fileobj)
                    if key.fileobj == self.reports:
                        raise Over("died", "everything in the sandbox was killed")
            if self.watched:
                self._watch()
        line, _, self.lines = self.lines.partition(b"\n")
        return check_report(line)

    def _watch(self) -> None:
        found = descendants(self.process.pid)
        self.seen |= found
        limit = self.limits["memory_mb"] * 2**20
        if self.group is None and memory_of({process for process in found if process.pid != self.judge}, limit) > limit:
            raise Over("memory", f"more than {self.limits['memory_mb']} MB of memory")

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
        if self.printed > self.limits["output_mb"] * 2**20 or self.reported > PIPE_LIMIT:
            raise Over("output", f"too much output; {self.limits['output_mb']} MB are allowed")
        return len(data)

    def _end(self) -> None:
        """Kill all that is left."""
        if not self.namespaces:
            kill_all(self.process.pid, self.mark, self.seen)
        self.process.terminate()  # the supervisor kills its two processes and waits for them
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                stream.close()


def explain_end(code: int, cpu_seconds: float, limit: float) -> tuple[str, str]:
    """Status and detail of a process that ended without a word; ``code`` is negative for a signal."""
    # The kernel's limit counts in ticks and may strike a little early.
    if code == -signal.SIGKILL and cpu_seconds > limit - 0.1:
        return "timeout", f"more than {limit} s of processor time"
    if code >= 0:
        return "died", f"exit code {code}"
    try:
        return "died", f"signal {signal.Signals(-code).name}"
    except ValueError:  # real-time signals have no names
        return "died", f"signal {-code}"


def check_report(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
        fields = REPORTS[event["event"]]
        if all(type(event[name]) in kinds for name, kinds in fields.items()):
            return event
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    raise Over("died", "an odd report")


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
    name, _, value = mark.partition("=")
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    places = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": folder, "TMPDIR": folder}
    return {**places, **threads, "LANG": "C.UTF-8", name: value}


def _make_folder() -> str:
    folder = tempfile.mkdtemp(prefix="setflow-sandbox-")
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    return folder


def _remove(folder: str) -> None:
    os.chmod(folder, 0o700)
    for path, names, _ in os.walk(folder):  # the program may have locked its folders
        for name in names:
            if not os.path.islink(child := os.path.join(path, name)):
                os.chmod(child, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
