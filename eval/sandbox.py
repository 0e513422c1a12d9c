"""Run Python code that nobody has read, and judge it by tests that it never sees.

Every program gets processes of its own with limits on time, memory, processes, files and output, an empty environment
and an empty folder that vanishes afterwards. On Linux it also gets namespaces of its own (no network, no sight of other
processes, a file system with nothing but the interpreter and its packages, read-only, and no way for a child to outlive
it), a filter that leaves it the system calls that Python needs, and a control group that counts the memory of all its
processes together. ``find_isolation`` says what of it this machine allows. Without namespaces or filter nothing runs
unless the user has agreed to that too: a program can then read and change what belongs to the user, files and, without
filter, other processes; it may even read the tests in the memory of the process that judges it.

Tests run in another process than the program and call its functions over a pipe, in plain values (sandboxing/values.py).
The program's process holds neither what the tests expect nor the way on which the verdict is reported, so it can pass
only by giving the right values. What remains: a program without tests tells by itself that it came to its end; objects
that are no plain values are compared by the program's own methods, though never with a value of the tests; and functions
that tests use besides the one they test are the program's, unless the tests bring their own.
"""

import functools
import os
import secrets
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from decoding.inputs.checks import check_count, check_range
from eval.sandboxing.memory import MemoryGroup, find_place
from eval.sandboxing.outside import Run
from eval.sandboxing.system_calls import why_no_filter

MARK = "SETFLOW_SANDBOX"
WEAK_CONSENT = "SETFLOW_ALLOW_WEAK_SANDBOX"


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    seconds: wall clock, from the program's first statement.
    cpu_seconds: of each process. memory_mb: address space of each process and, where there is a control group or /proc,
        memory of all together.
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
        for name in ("cpu_seconds", "memory_mb", "processes", "files_mb", "output_mb"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True)
class Verdict:
    """How a program ended.

    passed: it ran to its end without an exception, and so did its tests.
    status: "passed", "failed" (an exception, SystemExit included), "timeout", "memory" or "output" (too much of it) or
        "died" (it ended without a word: os._exit, a signal).
    detail: the exception or what else is known. output: the last bytes of stdout and stderr, as text.
    seconds: wall clock from the first statement.
    """

    passed: bool
    status: str
    detail: str
    output: str
    seconds: float


def why_no_group() -> str:
    """Why a program gets no control group; empty if it gets one."""
    place = find_place()
    return place if isinstance(place, str) else ""


@dataclass(frozen=True)
class Isolation:
    """What protects this machine from a program.

    namespaces: whether it gets Linux namespaces of its own; reason: why not. no_filter, no_group: why it gets no filter
    for system calls, no control group for memory; empty if it does.
    """

    namespaces: bool
    reason: str = ""
    no_filter: str = field(default_factory=why_no_filter)
    no_group: str = field(default_factory=why_no_group)

    @property
    def missing(self) -> str:
        """What a program could do that it should not, and why; empty if all is well."""
        parts = []
        if not self.namespaces:
            parts.append(f"no namespaces ({self.reason}), so it can read, change and delete its user's files")
        if self.no_filter:
            parts.append(
                f"no filter for system calls ({self.no_filter}), so it reaches all of the kernel that its user can"
            )
        return "; ".join(parts)

    def __str__(self) -> str:
        memory = f"memory watched, not limited, by /proc ({self.no_group})" if self.no_group else "memory in one group"
        calls = f"no filter for system calls ({self.no_filter})" if self.no_filter else "filtered system calls"
        return f"{'namespaces' if self.namespaces else f'without namespaces ({self.reason})'}, {calls}, {memory}"


@functools.cache
def find_isolation() -> Isolation:
    """Try once what this machine allows."""
    if sys.platform != "linux":
        return Isolation(False, f"{sys.platform} has none")
    try:
        verdict = run_untrusted("import ctypes, hashlib, re", isolation=Isolation(True))
    except RuntimeError as error:
        return Isolation(False, str(error))
    return Isolation(verdict.passed, verdict.detail)


def require_isolation() -> Isolation:
    """What this machine allows; raises ValueError if that is too little and the user has not agreed to it."""
    isolation = find_isolation()
    if isolation.missing and os.environ.get(WEAK_CONSENT) != "1":
        raise ValueError(
            f"the sandbox of a program would be weak on this machine: {isolation.missing}; agree to that with "
            f"--confirm-weak-sandbox or {WEAK_CONSENT}=1, got {WEAK_CONSENT}={os.environ.get(WEAK_CONSENT)!r}"
        )
    return isolation


def run_untrusted(
    program: str,
    limits: Limits | None = None,
    *,
    before: str = "",
    tests: str = "",
    isolation: Isolation | None = None,
) -> Verdict:
    """Execute ``program``, then ``tests`` in another process, and wait for their end. Safe to call from several threads.

    before: code to execute ahead of the program, in its process but not in its namespace. tests: code that may use the
    names of the program; it sees plain values and, for all else, references to objects in the program's process.

    Raises RuntimeError if the sandbox itself cannot be set up, ValueError as ``require_isolation`` does, unless it is
    told the ``isolation`` to use.

        verdict = run_untrusted("def double(x): return x + x", tests="assert double('a') == 'aaa'")
        verdict.status, verdict.detail  # ("failed", "AssertionError: ")
    """
    limits = limits or Limits()
    isolation = isolation or require_isolation()
    mark = f"{MARK}={secrets.token_hex(8)}"
    with ExitStack() as stack:
        group = None
        if not isolation.no_group:
            group = MemoryGroup(find_place(), limits.memory_mb)
            stack.callback(group.remove)
        protection = {"namespaces": isolation.namespaces, "filtered": not isolation.no_filter}
        with Run(asdict(limits), mark, group, **protection) as run:
            status, detail, output, seconds = run.follow({"before": before, "program": program, "tests": tests})
        if group is not None and group.exceeded():
            status, detail = "memory", f"more than {limits.memory_mb} MB of memory"
    return Verdict(status == "passed", status, detail, output, seconds)
