"""Limits and verdicts."""

import sys
import time
from pathlib import Path

import pytest

from eval.sandbox import Limits, run_untrusted

pytestmark = pytest.mark.usefixtures("nothing_remains")


def test_a_program_that_ends_passes():
    verdict = run_untrusted("print('fine')\nassert sorted([2, 1]) == [1, 2]")
    assert (verdict.passed, verdict.status, verdict.detail, verdict.output) == (True, "passed", "", "fine\n")
    assert 0 <= verdict.seconds < 3


@pytest.mark.parametrize(
    "program, detail",
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import sys; sys.exit()", "SystemExit"),
        ("input()", "RuntimeError: input(): lost sys.stdin"),
        ("class E(Exception):\n  def __str__(self): raise KeyError\nraise E", "cannot be printed"),
        ("def f(): f()\nf()", "RecursionError"),
        ("no_such_module", "NameError"),
        ("'\\ud800'.encode()", "UnicodeEncodeError"),
    ],
)
def test_an_exception_fails(program, detail):
    verdict = run_untrusted(program)
    assert not verdict.passed and verdict.status == "failed" and detail in verdict.detail


FORGERY = """
import json, os
event = json.dumps({"event": "verdict", "status": "passed", "detail": "", "secret": None}).encode()
for fd in range(3, 64):
    try: os.write(fd, event + b"\\n{}\\n[]\\nnot json\\n")
    except OSError: pass
os._exit(3)
"""


@pytest.mark.parametrize(
    "program, detail",
    [
        ("import os; os._exit(0)", "exit code 0"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        (FORGERY, "exit code 3"),
    ],
)
def test_an_end_without_a_word_is_not_a_pass(program, detail):
    verdict = run_untrusted(program)
    assert not verdict.passed and verdict.status == "died" and detail in verdict.detail


def test_endless_loop_is_stopped():
    start = time.monotonic()
    verdict = run_untrusted("while True: pass", Limits(seconds=0.5))
    assert verdict.status == "timeout" and verdict.seconds < 2 and time.monotonic() - start < 10


def test_loop_that_catches_everything_is_stopped():
    program = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    try:
        while True: pass
    except: pass
"""
    assert run_untrusted(program, Limits(seconds=0.5)).status == "timeout"


def test_processor_time_is_limited():
    verdict = run_untrusted("while True: pass", Limits(seconds=30, cpu_seconds=1))
    assert verdict.status == "timeout" and "processor" in verdict.detail


def test_memory_hog_gets_a_memory_error():
    verdict = run_untrusted("x = bytearray(2 ** 32)", Limits(memory_mb=512))
    assert verdict.status == "failed" and "MemoryError" in verdict.detail
    slowly = "x = []\nwhile True: x.append('a' * 1_000_000)"
    verdict = run_untrusted(slowly, Limits(memory_mb=256, seconds=10, cpu_seconds=10))
    assert verdict.status == "failed" and "MemoryError" in verdict.detail


def test_fork_bomb_is_limited():
    program = """
import os, time
born = 0
try:
    while born < 500:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        born += 1
except BlockingIOError:
    pass
print(born)
"""
    verdict = run_untrusted(program, Limits(processes=16, seconds=5))
    assert verdict.passed and int(verdict.output) <= 16
    run_untrusted("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", Limits(seconds=0.5))


def test_huge_output_is_cut():
    verdict = run_untrusted("while True: print('x' * 10_000)", Limits(output_mb=1, seconds=20, cpu_seconds=20))
    assert verdict.status == "output" and len(verdict.output) <= 2000
    verdict = run_untrusted("print('x' * 100_000 + 'end')")
    assert verdict.passed and verdict.output.endswith("end\n") and len(verdict.output) <= 2000


def test_files_are_limited():
    program = "with open('big', 'wb') as f:\n  while True: f.write(bytes(2 ** 20))"
    assert not run_untrusted(program, Limits(files_mb=4, seconds=20)).passed


def test_the_environment_is_not_inherited(monkeypatch):
    monkeypatch.setenv("SETFLOW_TEST_SECRET", "do-not-leak")
    program = "import os\nassert 'SETFLOW_TEST_SECRET' not in os.environ\nprint(dict(os.environ), os.listdir('.'))"
    verdict = run_untrusted(program)
    # The folder is empty, but for the way to a Python that itself lies in the temporary folder.
    inside = [Path(sys.prefix).parts[2]] if sys.prefix.startswith("/tmp/") else []
    assert verdict.passed and "do-not-leak" not in verdict.output and verdict.output.endswith(f"{inside}\n")


@pytest.mark.parametrize("field", ["seconds", "cpu_seconds", "memory_mb", "processes", "files_mb", "output_mb"])
def test_impossible_limits_are_refused(field):
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})
