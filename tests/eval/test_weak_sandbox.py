"""Where the kernel refuses namespaces or the filter: nothing runs without a second consent, and little with it."""

import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from eval import sandbox
from eval.code_eval import CodeEval
from eval.sandbox import WEAK_CONSENT, Isolation, Limits, find_isolation, run_untrusted
from eval.sandboxing.system_calls import why_no_filter
from setflow.cli import main

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to look for processes")
needs_filter = pytest.mark.skipif(bool(why_no_filter()), reason=f"no filter: {why_no_filter()}")
WEAK = {
    "no namespaces": Isolation(False, "unshare: Operation not permitted", no_filter=""),
    "no filter": Isolation(True, no_filter="seccomp: Invalid argument"),
    "neither": Isolation(False, "unshare: No space left on device", no_filter="no filter for mips processors"),
}


@pytest.fixture(params=WEAK)
def weak_machine(request, monkeypatch):
    """A machine that allows no more than one of WEAK; nothing has been agreed to."""
    monkeypatch.setattr(sandbox, "find_isolation", lambda: WEAK[request.param])
    monkeypatch.delenv(WEAK_CONSENT, raising=False)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr(sandbox, "Run", None)  # nothing can run
    return WEAK[request.param]


def expected_words(isolation: Isolation) -> list[str]:
    words = ["--confirm-weak-sandbox", f"{WEAK_CONSENT}=1"]
    if not isolation.namespaces:
        words += ["no namespaces", isolation.reason, "delete its user's files"]
    return [*words, isolation.no_filter] if isolation.no_filter else words


def test_nothing_runs_without_the_second_consent(weak_machine):
    for attempt in (
        lambda: run_untrusted("pass"),
        lambda: CodeEval().compute(references=["assert 1"], predictions=[["pass"]], k=[1]),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert all(word in str(error.value) for word in expected_words(weak_machine))


@pytest.mark.parametrize("command", [["eval"], ["eval", "sweep", "--decoder", "ntp"]])
def test_the_command_line_refuses_before_a_model_is_loaded(
    weak_machine, command, data_folder, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")
    from eval import model

    monkeypatch.setattr(model.SetflowLM, "__init__", lambda *a, **k: pytest.fail("a model is loaded"))
    arguments = [*command, "--tasks", "humaneval", "--data", str(data_folder), "--out", str(tmp_path)]
    assert main([*arguments, "--confirm-run-unsafe-code"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    assert all(word in said for word in expected_words(weak_machine))


def test_with_the_second_consent_it_runs_and_says_so(weak, monkeypatch, data_folder):
    pytest.importorskip("lm_eval", reason="needs lm-eval: install the extra [eval]")
    from eval.tasks import load_tasks

    monkeypatch.setattr(sandbox, "find_isolation", lambda: weak)
    monkeypatch.setenv(WEAK_CONSENT, "0")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    (task,) = load_tasks(["humaneval"], data_folder, confirm_run_unsafe_code=True, confirm_weak_sandbox=True)
    assert os.environ[WEAK_CONSENT] == "1"
    doc = task.eval_docs[0]
    answers = [[doc["prompt"] + doc["canonical_solution"], doc["prompt"] + "    pass"]]
    scores, _ = CodeEval().compute(references=[task.doc_to_target(doc)], predictions=answers, k=[1], timeout=10)
    assert scores == {"pass@1": 0.5}
    assert str(weak).startswith("without namespaces (switched off in this test), ")


def test_what_is_missing_is_written_down():
    assert str(WEAK["neither"]).startswith(
        "without namespaces (unshare: No space left on device), no filter for system"
    )
    assert str(replace(WEAK["no filter"], no_group="")).endswith("(seccomp: Invalid argument), memory in one group")
    assert "not limited" in str(replace(WEAK["no filter"], no_group="no control group for memory"))
    assert Isolation(True, no_filter="").missing == ""


@pytest.mark.skipif(not find_isolation().namespaces, reason=f"no namespaces: {find_isolation().reason}")
def test_a_kernel_that_refuses_namespaces_is_found_out():
    """In a user namespace that may have no others inside, as in some containers."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            import ctypes

            user, group = os.geteuid(), os.getegid()
            if ctypes.CDLL(None).unshare(0x10000000) == 0:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
                Path("/proc/sys/user/max_user_namespaces").write_text("0")
                os.write(write, str(find_isolation.__wrapped__()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    if not said:
        pytest.skip("this machine does not let us refuse ourselves namespaces")
    assert said.startswith("without namespaces (unshare: ")


def sleepers(tag: str) -> list[str]:
    """Processes whose command line holds ``tag``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if tag.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


# Ways out of a process group, an environment and a family; each leaves a process with TAG in its command line.
LEAVE = "os.execve('/bin/sh', ['sh', '-c', 'sleep 60; : TAG'], {})"
ESCAPES = {
    "a session of its own": f"if not os.fork():\n  os.setsid()\n  {LEAVE}",
    "twice forked": f"if not os.fork():\n  os.setsid()\n  if os.fork(): os._exit(0)\n  {LEAVE}",
    "ten times forked": f"for i in range(10):\n  if os.fork(): os._exit(0)\n  os.setsid()\n{LEAVE}",
    "a subprocess": "import subprocess\n"
    "subprocess.Popen(['sh', '-c', 'sleep 60; : TAG'], env={}, start_new_session=True, close_fds=True)",
    "many": f"for i in range(8):\n  if not os.fork():\n    os.setsid()\n    {LEAVE}",
    "killing the others first": "import signal, time\nif not os.fork():\n  os.setsid()\n  parent = os.getppid()\n"
    "  for pid in (parent, parent - 1, parent - 2, -1, -parent, 1 - parent):\n    try: os.kill(pid, signal.SIGKILL)\n"
    f"    except OSError: pass\n  {LEAVE}",
}


@needs_proc
@pytest.mark.parametrize("escape", ESCAPES)
def test_children_are_found_by_more_than_their_environment(weak, escape):
    tag = f"setflow-test-{os.getpid()}-{list(ESCAPES).index(escape)}"
    program = f"import os, time\n{ESCAPES[escape].replace('TAG', tag)}\ntime.sleep(0.3)"
    run_untrusted(program, Limits(seconds=5), isolation=weak)
    assert sleepers(tag) == []


@needs_filter
def test_signals_reach_nobody_else(weak):
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        program = f"""
import fcntl, os, signal, socket
for pid in ({other.pid}, -{other.pid}, {os.getpid()}, os.getppid(), 1, -1):
    for act in (
        lambda: os.kill(pid, signal.SIGTERM),
        lambda: os.kill(pid, 0),
        lambda: signal.pidfd_send_signal(os.pidfd_open(abs(pid)), signal.SIGTERM),
        lambda: fcntl.fcntl(0, fcntl.F_SETOWN, pid),
    ):
        try: act()
        except OSError: continue
        raise SystemExit(f'reached {{pid}}')
signal.signal(signal.SIGUSR1, lambda *_: print('own'))
os.kill(os.getpid(), signal.SIGUSR1)
"""
        verdict = run_untrusted(program, isolation=weak)
        assert verdict.passed and verdict.output == "own\n", verdict
        time.sleep(0.05)
        assert other.poll() is None
        other.kill()


@needs_filter
def test_the_network_is_out_of_reach_without_namespaces_too(weak, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local:
        local.bind(str(tmp_path / "socket"))
        program = f"""
import socket
for act in (
    lambda: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1),
    lambda: socket.socket(socket.AF_UNIX).connect({str(tmp_path / "socket")!r}),
    lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', {str(tmp_path / "socket")!r}),
):
    try: act()
    except OSError: continue
    raise SystemExit('reached')
"""
        verdict = run_untrusted(program, isolation=weak)
        assert verdict.passed, verdict


SPY = """
import glob, os
def f(known):
    found = b''
    for path in glob.glob('/proc/[0-9]*/*') + glob.glob('/proc/[0-9]*/fd/*'):
        if path.split('/')[2] in (str(os.getpid()), known):
            continue
        try:
            if path.endswith('/mem'):
                with open(path.replace('/mem', '/maps')) as maps, open(path, 'rb') as memory:
                    for line in maps:
                        first, last = (int(x, 16) for x in line.split()[0].split('-'))
                        if ' rw' in line and last - first < 2 ** 24:
                            memory.seek(first)
                            found += memory.read(last - first)
            elif path.endswith(('environ', 'cmdline')) or '/fd/' in path:
                found += os.pread(os.open(path, os.O_RDONLY | os.O_NONBLOCK), 2 ** 16, 0)
        except OSError:
            continue
    at = found.find(b'expected-' + b'value-')
    return found[at : at + 30].decode('latin-1') if at >= 0 else None
"""


@needs_proc
def test_the_judge_cannot_be_looked_into(weak):
    known = str(os.getpid())  # whose memory holds the tests, open to others of its user
    tests = f"assert f({known!r}) is None, 'found'\nassert 'expected-value-1234'"
    verdict = run_untrusted(SPY, Limits(seconds=20, cpu_seconds=20), tests=tests, isolation=weak)
    assert verdict.passed, verdict
