"""The inside of the sandbox: a script that shuts itself in and then runs one program. Started by sandbox.py only.

It talks to the parent in lines of JSON on the pipe ``argv[1]``; ``argv[2]`` is 1 if it shall use Linux namespaces:

    -> unshared        new namespaces are made; the parent maps the user ids and sends the request on stdin
    -> started         the program begins; its time runs from here
    -> verdict         how it ended, as told by the process that ran it
    -> exited          that process and, with namespaces, all its children are gone
    -> refused         the kernel does not let us build the sandbox

``verdict`` and ``exited`` carry the request's secret, so that a program cannot write them by accident or from a child.
Standard library only: it runs with ``python -I -S``. No ``__future__`` import: ``exec`` would hand it to the program.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)

# From linux/sched.h, linux/mount.h and linux/prctl.h.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x2000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 442, -100, 0x8000, 0x1, 0x2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, LINUX_CAPABILITY_VERSION_3 = 1, 38, 0x20080522

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


def run(program, report):
    """Execute ``program`` in an empty namespace, as lm-eval's code_eval metric does, and report how it ended."""
    sys.stdin = None  # reading from it is an error
    report(event="started")
    status, detail = "passed", ""
    try:
        exec(program, {})
    except BaseException as error:
        status = "failed"
        try:
            detail = f"{type(error).__name__}: {error}"[:500]
        except BaseException:
            detail = "an exception that cannot be printed"
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    report(event="verdict", status=status, detail=detail)
    os._exit(0)


def main():
    pipe, namespaces = int(sys.argv[1]), sys.argv[2] == "1"
    secret = None

    def report(**event):
        os.write(pipe, json.dumps({**event, "secret": secret}).encode() + b"\n")

    try:
        if LINUX:
            check("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if namespaces:
            if os.geteuid() == 0:
                os.setgroups([])
            every = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
            check("unshare", libc.unshare(every))
        report(event="unshared")
        request = json.load(sys.stdin)
        os.umask(0o022)
        if namespaces:
            build_root(request["readable"], request["limits"]["files_mb"])
        child = os.fork()  # with namespaces the first process of its own: when it ends, the kernel ends all others
        if child == 0:
            os.setsid()
            give_up_privileges(namespaces)
    except OSError as error:
        report(event="refused", reason=error.strerror or str(error))
        os._exit(1)
    secret = request["secret"]
    if child == 0:
        sys.path += request["packages"]
        limit(request["limits"])
        run(request["program"], report)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    _, ended, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    report(event="exited", code=os.waitstatus_to_exitcode(ended), cpu_seconds=usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    main()
