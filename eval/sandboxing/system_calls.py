"""A seccomp filter: the system calls that Python and its packages need, and no others.

What is not on the list looks as if the kernel did not have it (ENOSYS), so that libraries take the way they have for
older kernels: io_uring, bpf, perf, userfaultfd, keyrings, mounts, namespaces, ptrace, memory files, System V shared
memory, and whatever later kernels add. A few calls are allowed for some of their arguments only.

The program is classic BPF (linux/filter.h, linux/seccomp.h) for x86-64 and aarch64.
"""

import ctypes
import errno
import os
import struct
import sys
from collections import namedtuple
from itertools import chain

# name:number on x86-64:number on aarch64, from asm/unistd_64.h and asm-generic/unistd.h.
ALLOWED = """
brk:12:214 chdir:80:49 clock_getres:229:114 clock_gettime:228:113 clock_nanosleep:230:115 clone:56:220 close:3:57
close_range:436:436 copy_file_range:326:285 dup:32:23 dup3:292:24 epoll_create1:291:20 epoll_ctl:233:21
epoll_pwait:281:22 epoll_pwait2:441:441 eventfd2:290:19 execve:59:221 execveat:322:281 exit:60:93 exit_group:231:94
faccessat:269:48 faccessat2:439:439 fadvise64:221:223 fallocate:285:47 fchdir:81:50 fchmod:91:52 fchmodat:268:53
fchown:93:55 fchownat:260:54 fcntl:72:25 fdatasync:75:83 fgetxattr:193:10 flistxattr:196:13 flock:73:32 fstat:5:80
fstatfs:138:44 fsync:74:82 ftruncate:77:46 futex:202:98 futex_waitv:449:449 get_robust_list:274:100 getcpu:309:168
getcwd:79:17 getdents64:217:61 getegid:108:177 geteuid:107:175 getgid:104:176 getgroups:115:158 getitimer:36:102
getpeername:52:205 getpgid:121:155 getpid:39:172 getppid:110:173 getpriority:140:141 getrandom:318:278
getresgid:120:150 getresuid:118:148 getrlimit:97:163 getrusage:98:165 getsid:124:156 getsockname:51:204
getsockopt:55:209 gettid:186:178 gettimeofday:96:169 getuid:102:174 getxattr:191:8 inotify_add_watch:254:27
inotify_init1:294:26 inotify_rm_watch:255:28 ioctl:16:29 kill:62:129 lgetxattr:192:9 linkat:265:37 listxattr:194:11
llistxattr:195:12 lseek:8:62 madvise:28:233 membarrier:324:283 mincore:27:232 mkdirat:258:34 mknodat:259:33
mlock:149:228 mmap:9:222 mprotect:10:226 mremap:25:216 msync:26:227 munlock:150:229 munmap:11:215 nanosleep:35:101
newfstatat:262:79 openat:257:56 openat2:437:437 pipe2:293:59 ppoll:271:73 prctl:157:167 pread64:17:67 preadv:295:69
preadv2:327:286 prlimit64:302:261 pselect6:270:72 pwrite64:18:68 pwritev:296:70 pwritev2:328:287 read:0:63
readahead:187:213 readlinkat:267:78 readv:19:65 recvfrom:45:207 recvmmsg:299:243 recvmsg:47:212 renameat:264:38
renameat2:316:276 restart_syscall:219:128 rseq:334:293 rt_sigaction:13:134 rt_sigpending:127:136
rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigsuspend:130:133 rt_sigtimedwait:128:137
sched_get_priority_max:146:125 sched_get_priority_min:147:126 sched_getaffinity:204:123 sched_getparam:143:121
sched_getscheduler:145:120 sched_yield:24:124 sendfile:40:71 sendmmsg:307:269 sendmsg:46:211 sendto:44:206
set_robust_list:273:99 set_tid_address:218:96 setitimer:38:103 setpgid:109:154 setrlimit:160:164 setsid:112:157
setsockopt:54:208 shutdown:48:210 sigaltstack:131:132 signalfd4:289:74 socket:41:198 socketpair:53:199 splice:275:76
statfs:137:43 statx:332:291 symlinkat:266:36 sync_file_range:277:84 sysinfo:99:179 tee:276:77 tgkill:234:131
timer_create:222:107 timer_delete:226:111 timer_getoverrun:225:109 timer_gettime:224:108 timer_settime:223:110
timerfd_create:283:85 timerfd_gettime:287:87 timerfd_settime:286:86 times:100:153 tkill:200:130 truncate:76:45
umask:95:166 uname:63:160 unlinkat:263:35 utimensat:280:88 wait4:61:260 waitid:247:95 write:1:64 writev:20:66
access:21 alarm:37 arch_prctl:158 chmod:90 chown:92 creat:85 dup2:33 epoll_create:213 epoll_wait:232 eventfd:284
fork:57 futimesat:261 getdents:78 getpgrp:111 inotify_init:253 lchown:94 link:86 lstat:6 mkdir:83 mknod:133 open:2
pause:34 pipe:22 poll:7 readlink:89 rename:82 rmdir:84 select:23 signalfd:282 stat:4 symlink:88 time:201 unlink:87
utime:132 utimes:235 vfork:58
"""
MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # AUDIT_ARCH of linux/audit.h; column in ALLOWED


# What the low half of argument number ``argument`` must be: "among" ``values``, "not among" them or "without" these bits;
# else the call fails with ``error``.
Check = namedtuple("Check", "argument rule values error", defaults=[errno.EPERM])


NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW flags of linux/sched.h
MAP_HUGETLB, SOCK_DGRAM, AF_UNIX = 0x40000, 2, 1
# Names of threads and of memory, and questions. Not the death signal, nor whether others may look in.
PRCTL = (2, 3, 15, 16, 21, 23, 39, 0x53564D41)
# Of files and terminals: size, flags, bytes to read.
IOCTL = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15  # ways to send a signal
CHECKS = {
    "clone": [Check(0, "without", (NEW_NAMESPACES,))],
    "fcntl": [Check(1, "not among", (F_SETOWN, F_SETSIG, F_SETOWN_EX))],
    "ioctl": [Check(1, "among", IOCTL, errno.ENOTTY)],
    "mmap": [Check(3, "without", (MAP_HUGETLB,), errno.ENOMEM)],  # counted by no limit on memory
    "prctl": [Check(0, "among", PRCTL, errno.EINVAL)],
    "prlimit64": [Check(0, "among", (0,))],  # one's own
    "socket": [Check(0, "among", (), errno.ENETUNREACH)],
    "socketpair": [Check(0, "among", (AF_UNIX,), errno.EAFNOSUPPORT), Check(1, "without", (SOCK_DGRAM,))],
}

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
ALLOW, KILL_PROCESS, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]  # code, instructions to skip if true, if false, constant


def why_no_filter() -> str:
    """Why programs cannot get a filter on this machine; empty if they can."""
    if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32:
        return f"no filter for {sys.platform} with {sys.maxsize.bit_length() + 1} bits"
    if os.uname().machine not in MACHINES:
        return f"no filter for {os.uname().machine} processors"
    # Without a program to install, a kernel that has filters says that the address is wrong.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    code = ctypes.get_errno()
    return "" if code == errno.EFAULT else f"seccomp: {os.strerror(code)}"


def make_filter(machine: str, signals_to: int | None = None) -> list[Instruction]:
    """The filter for ``machine``, a key of MACHINES. signals_to: the only process that may get signals; None: any."""
    architecture, column = MACHINES[machine]
    checks = dict(CHECKS)
    if signals_to is not None:
        checks |= {name: [Check(0, "among", (signals_to,))] for name in ("kill", "tkill", "tgkill")}
    program = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, NUMBER)]
    for row in ALLOWED.split():
        name, *numbers = row.split(":")
        if column <= len(numbers):
            steps = [*chain.from_iterable(map(_steps, checks.get(name, ()))), (RETURN, 0, 0, ALLOW)]
            program += [(EQUAL, 0, len(steps), int(numbers[column - 1])), *steps]
    return [*program, (RETURN, 0, 0, ERROR | errno.ENOSYS)]


def _steps(check: Check) -> list[Instruction]:
    """Go on behind these if ``check`` holds, else return its error."""
    load, refuse = (LOAD, 0, 0, ARGUMENTS + 8 * check.argument), (RETURN, 0, 0, ERROR | check.error)
    values = check.values
    if check.rule == "among":
        return [load, *[(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)], refuse]
    test = EQUAL if check.rule == "not among" else ANY_BIT
    return [load, *chain.from_iterable([(test, 0, 1, value), refuse] for value in values)]


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install(own_signals_only: bool) -> None:
    """Put this process and all its children under the filter, for good. Raises OSError if the kernel refuses."""
    instructions = make_filter(os.uname().machine, os.getpid() if own_signals_only else None)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(instructions), code)), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
