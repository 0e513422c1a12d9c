"""The inside of the sandbox: a process that shuts itself in, starts the two that do the work and waits for their end.

    supervisor ──┬── judge      has the tests and reports the verdict
                 └── answer     runs the program; with namespaces the first process of its own

The judge and the answer talk over two pipes (wire.py); the answer holds nothing else. With namespaces it cannot name the
judge, without them the judge lets nobody look into it. ``argv[2]`` holds the settings, as JSON. To the parent go lines
of JSON on the pipe ``argv[1]``:

    -> unshared        new namespaces are made; the parent maps the user ids and sends an empty line on stdin
    -> started         ids of both; the parent sends the program and its tests on stdin, and the program's time runs
    -> verdict         of the judge (judge.py)
    -> exited          "judge" or "answer", and how
    -> refused         the kernel does not let us build the sandbox

Started by sandbox.py only. Standard library only: it runs with ``python -I -S``.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

from eval.sandboxing import system_calls
from eval.sandboxing.answer import serve
from eval.sandboxing.judge import judge

LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)

# From linux/sched.h, linux/mount.h and linux/prctl.h.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x2000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 4, 38, 36
LINUX_CAPABILITY_VERSION_3 = 0x20080522

REPORTS = 3  # descriptor of the pipe to the parent
INSIDE = 1000  # user and group id in the sandbox
NOBODY = 65534
# What a Python process and its children read besides the interpreter's own folders.
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def check(name, result):
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def mount(source, target, kind, flags, options=None):
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    check(f"mount {target}", libc.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[3]))


def make_read_only(path, recursive):
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    arguments = (AT_FDCWD, os.fsencode(path), flags, ctypes.byref(attributes), ctypes.c_size_t(32))
    check(f"mount_setattr {path}", libc.syscall(SYS_MOUNT_SETATTR, *arguments))


def show(root, path):
    """Make ``path`` readable at the same place under ``root``."""
    target = root + path
    if os.path.islink(path) and not path.startswith("/dev"):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT))
    mount(path, target, None, MS_BIND | MS_REC)
    make_read_only(target, recursive=True)


def build_root(readable, megabytes):
    """Move into a file system that holds only ``readable``, read-only, and an empty /tmp of limited size."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/proc"  # a folder that every system has and that we do not need any more
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    mount(
        "tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={megabytes}m,nr_inodes=4096,mode=1777"
    )  # first: a venv may lie in it
    shown = []
    for path in sorted({*SYSTEM_PATHS, *DEVICES, *readable}, key=lambda path: path.count("/")):
        if os.path.exists(path) and not any(path.startswith(f"{other}/") for other in shown):
            show(root, path)
            shown.append(path)
    make_read_only(root, recursive=False)
    os.chdir(root)
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/tmp")


def give_up_privileges(namespaces):
    """Become an ordinary user. Root outside of namespaces becomes nobody."""
    if namespaces:
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
        header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
        check("capset", libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())))
    elif os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        if not os.access(os.__file__, os.R_OK):
            raise OSError(f"root without namespaces runs programs as nobody, who cannot read {sys.base_prefix}")
    if LINUX:
        check("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        # A change of user clears it, so not earlier.
        check("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def limit(limits):
    megabyte = 2**20
    for name, value in (
        ("RLIMIT_AS", limits["memory_mb"] * megabyte),
        ("RLIMIT_FSIZE", limits["files_mb"] * megabyte),
        ("RLIMIT_CPU", limits["cpu_seconds"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_NOFILE", 128),
        ("RLIMIT_CORE", 0),
    ):
        # macOS lacks some of them; a hard limit that is lower already stays.
        with contextlib.suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))


def report(**event):
    line = json.dumps(event, ensure_ascii=False).encode(errors="backslashreplace")  # in one piece: below PIPE_BUF
    os.write(REPORTS, line + b"\n")


def start(task, ready, settings, *, visible):
    """Fork a process that gives up what it does not need and then does ``task``; returns its id.

    ready: a pipe on which it says what went wrong; it closes when all is well. visible: whether other processes of the
    same user may look into it and send it signals.
    """
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        give_up_privileges(settings["namespaces"])
        if LINUX:
            check("prctl", libc.prctl(PR_SET_DUMPABLE, int(visible), 0, 0, 0))
        sys.path += settings["packages"]
        limit(settings["limits"])
        if settings["filter"]:
            system_calls.install(own_signals_only=not (settings["namespaces"] and visible))
    except OSError as error:
        os.write(ready, f"{error.strerror or error}\n".encode())
        os._exit(1)
    os.close(ready)
    try:
        task()
    finally:
        os._exit(0)


def close_all_but(*kept):
    """Close every descriptor from 3 on but these."""
    first = 3
    for descriptor in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, descriptor)
        first = descriptor + 1


def shut_in(settings):
    """Enter namespaces of our own or, without them, become the one whom children without a parent are given to."""
    if settings["namespaces"]:
        if os.geteuid() == 0:
            with contextlib.suppress(PermissionError):  # root of some containers
                os.setgroups([])
        every = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
        check("unshare", libc.unshare(every))
    report(event="unshared")
    os.read(0, 1)  # user ids are mapped
    os.umask(0o022)
    if settings["namespaces"]:
        build_root(settings["readable"], settings["limits"]["files_mb"])
    elif LINUX:
        check("prctl", libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        check("prctl", libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def start_both(settings):
    """Start the judge and the answer; returns their names by process id."""
    null = os.open("/dev/null", os.O_RDWR)
    questions, ask = os.pipe()
    replies, reply = os.pipe()
    failures, ready = os.pipe()

    def judge_it():
        os.dup2(null, 1)
        os.dup2(null, 2)
        close_all_but(REPORTS, replies, ask)
        with open(0, "rb") as stream:
            request = json.load(stream)
        status, detail = judge(replies, ask, request)
        report(event="verdict", status=status, detail=detail)

    def answer_it():
        os.dup2(null, 0)
        close_all_but(questions, reply)
        serve(questions, reply)

    processes = {start(judge_it, ready, settings, visible=False): "judge"}
    if settings["namespaces"]:
        check("unshare", libc.unshare(CLONE_NEWPID))  # for the answer alone, whose end ends all of its children
    processes[start(answer_it, ready, settings, visible=True)] = "answer"
    for descriptor in (0, null, questions, ask, replies, reply, ready):
        os.close(descriptor)
    with open(failures, "rb") as stream:
        if failure := stream.readline():
            raise OSError(failure.decode().strip())
    return processes


def supervise(processes):
    """Wait for the end of ``processes`` and then for SIGTERM, which ends them and us."""
    ending = False

    def end(*_):
        nonlocal ending
        ending = True
        for process in processes:
            for kill in (os.kill, os.killpg):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(process, signal.SIGKILL)
        if not processes:
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    report(event="started", **{name: process for process, name in processes.items()})
    while processes or not ending:
        try:
            process, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            signal.pause()
            continue
        if name := processes.pop(process, None):
            seconds = usage.ru_utime + usage.ru_stime
            report(event="exited", name=name, code=os.waitstatus_to_exitcode(status), cpu_seconds=seconds)


def main():
    sys.path.pop(0)  # where this package was found
    os.dup2(int(sys.argv[1]), REPORTS)
    settings = json.loads(sys.argv[2])
    try:
        if LINUX:
            check("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        shut_in(settings)
        processes = start_both(settings)
    except OSError as error:
        report(event="refused", reason=error.strerror or str(error))
        os._exit(1)
    supervise(processes)
    os._exit(0)
