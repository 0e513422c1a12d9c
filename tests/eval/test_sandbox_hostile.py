"""Hostile programs: each must be stopped, nothing outside be touched, and nothing of it may remain."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import sandbox
from eval.sandbox import Limits, find_isolation, run_untrusted

pytestmark = pytest.mark.usefixtures("nothing_remains")
REFUSED = find_isolation().reason
needs_namespaces = pytest.mark.skipif(bool(REFUSED), reason=f"no namespaces: {REFUSED}")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to look for processes")


@needs_namespaces
def test_nothing_outside_the_folder_can_be_written(tmp_path):
    target = tmp_path / "victim"
    target.write_text("whole")
    places = ["/usr/x", "/x", "/etc/x", "/dev/x", "/home/x", sys.prefix + "/x"]
    program = f"""
import os
for place in {places!r}:
    for act in (lambda: open(place, 'w'), lambda: os.makedirs(place), lambda: os.remove(place)):
        try:
            act()
        except OSError:
            continue
        raise SystemExit('wrote ' + place)
open('/tmp/own', 'w').write('allowed')
"""
    assert run_untrusted(program).passed
    # Where tests use /tmp this succeeds, but in a /tmp of its own.
    run_untrusted(f"import os\nos.makedirs({str(tmp_path)!r})\nopen({str(target)!r}, 'w').write('broken')")
    assert target.read_text() == "whole" and os.listdir(tmp_path) == ["victim"]


@needs_namespaces
def test_secrets_in_files_are_out_of_sight(tmp_path):
    (tmp_path / "token").write_text("do-not-leak")
    places = [str(tmp_path), os.path.expanduser("~/.ssh"), "/etc/passwd", "/proc/1", "/sys", __file__]
    assert run_untrusted(f"import os\nassert not any(map(os.path.exists, {places!r}))").passed


@needs_namespaces
def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        verdict = run_untrusted(program)
        assert verdict.status == "failed" and "unreachable" in verdict.detail.lower()
    assert not run_untrusted("import socket\nsocket.create_connection(('8.8.8.8', 53), 1)").passed


@needs_namespaces
def test_privileges_cannot_be_taken_back():
    program = """
import os
for act in (lambda: os.setuid(0), lambda: os.chroot('/usr'), lambda: os.sethostname if False else os.nice(-5)):
    try:
        act()
    except OSError:
        continue
    raise SystemExit('too much power')
"""
    assert run_untrusted(program).passed


def test_a_program_holds_nothing_but_its_output_and_its_end_of_the_wire():
    with open(os.devnull) as other:
        os.set_inheritable(other.fileno(), True)
        program = """
import os, stat
found = {}
for fd in range(4096):
    try: found[fd] = os.fstat(fd)
    except OSError: pass
null, out, error, *wire = found.values()
assert os.path.samestat(null, os.stat('/dev/null')) and os.path.samestat(out, error), found
assert len(wire) == 2 and all(stat.S_ISFIFO(x.st_mode) for x in [out, *wire]) and len(set(wire)) == 2, found
"""
        verdict = run_untrusted(program, tests="assert 'tests' and 'are' and 'here'")
    assert verdict.passed, verdict


KILL_PARENT = """
import os, signal
for pid in (os.getppid(), 0, -1):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
"""
SLEEPING_CHILD = f"""
import os, subprocess, time
sleep = [{sys.executable!r}, "-c", "import time; time.sleep(60)"]
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sleep[0], sleep)
    os._exit(0)
subprocess.Popen(sleep, start_new_session=True)
time.sleep(0.2)
"""


def test_killing_the_parent_harms_only_itself():
    verdict = run_untrusted(KILL_PARENT)
    assert verdict.status in ("passed", "died")
    assert run_untrusted("pass").passed


@needs_proc
def test_a_sleeping_child_does_not_outlive_its_program():
    start = time.monotonic()
    assert run_untrusted(SLEEPING_CHILD).passed
    assert time.monotonic() - start < 20


@needs_proc
def test_the_sandbox_dies_with_its_owner(nothing_remains):
    script = f"""
from eval import sandbox
sandbox.MARK = {sandbox.MARK!r}
print("ready", flush=True)
sandbox.run_untrusted("while True: pass", sandbox.Limits(seconds=60, cpu_seconds=60))
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    with owner.stdout:
        assert owner.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while not nothing_remains() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert nothing_remains()
        owner.kill()
        owner.wait()
    while nothing_remains() and time.monotonic() < deadline:
        time.sleep(0.05)


HOSTILE = [
    "while True: pass",
    "import os; os._exit(1)",
    "import os\nfor _ in range(9): os.fork()",
    SLEEPING_CHILD,
    KILL_PARENT,
    "pass",
]


def many_runs(number: int) -> None:
    for i in range(number):
        program = HOSTILE[i % len(HOSTILE)] if i % 10 == 0 else f"open('file', 'w').write('{i}')\nassert {i} >= 0"
        run_untrusted(program, Limits(seconds=0.2))


@needs_proc
def test_50_runs_leave_nothing_behind(nothing_remains):
    many_runs(50)
    assert nothing_remains() == []


@needs_proc
@pytest.mark.slow
def test_1000_runs_leave_nothing_behind(nothing_remains):
    many_runs(1000)
    assert nothing_remains() == []


class TestWithoutNamespaces:
    """The weaker form, for kernels and containers that refuse namespaces."""

    @pytest.mark.parametrize(
        "program, status",
        [
            ("pass", "passed"),
            ("assert False", "failed"),
            ("while True: pass", "timeout"),
            ("x = bytearray(2 ** 33)", "failed"),
            ("import os; os.makedirs('a/b'); os.chmod('a', 0)", "passed"),
        ],
    )
    def test_verdicts(self, weak, program, status):
        assert run_untrusted(program, Limits(seconds=0.5), isolation=weak).status == status

    @needs_proc
    def test_no_process_remains(self, weak, nothing_remains):
        run_untrusted(SLEEPING_CHILD, isolation=weak)
        run_untrusted(KILL_PARENT, Limits(seconds=1), isolation=weak)
        assert nothing_remains() == []
