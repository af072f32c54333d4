"""What must not be possible, whatever the policies say: calls and arguments, judged on the compiled filters.

Each filter is that of a process with the id PID. Filters add up, so what a cell may do at its running stage is what all
of its filters allow; ``CELLS`` has them as the kernel asks them.
"""

from __future__ import annotations

import pytest

from jailer.seccomp import install
from jailer.seccomp.names import SYSCALL_NAMES
from tests.harness import bpf

NUMBERS = {name: number for number, name in SYSCALL_NAMES.items()}
CELL_USER = 0x78000180
PID, SUPERVISOR_PID, OTHER = 4321, 4000, 4322
RDWR, EXEC = 0x3, 0x4
AT_FDCWD = 0xFFFFFF9C
SOL_SOCKET = 1

#: A process → the filters that are on, each with the id of the process that installed it.
CELLS: dict[str, tuple[tuple[str, int], ...]] = {
    "supervisor": (("supervisor", SUPERVISOR_PID),),
    "vmm-setup": (("vmm-setup", PID),),
    "vmm": (("vmm-setup", PID), ("vmm", PID)),
    "vcpu-setup": (("supervisor", SUPERVISOR_PID), ("vcpu-setup", PID)),
    "vcpu": (("supervisor", SUPERVISOR_PID), ("vcpu-setup", PID), ("vcpu", PID)),
    "device-setup": (("supervisor", SUPERVISOR_PID), ("device-setup", PID)),
    "device": (("supervisor", SUPERVISOR_PID), ("device-setup", PID), ("device", PID)),
}
WORKERS = ("vcpu-setup", "vcpu")
CONTROLLERS = ("vmm-setup", "vmm")
DEVICE_CELLS = ("device-setup", "device")
#: Those that the supervisor forks when it is asked to, and when their setup is over.
SPAWNED = (*WORKERS, *DEVICE_CELLS)
SPAWNED_RUNNING = ("vcpu", "device")
ALL_BUT_SUPERVISOR = (*SPAWNED, *CONTROLLERS)
EVERYBODY = tuple(CELLS)
RUNNING = ("vcpu", "vmm", "device")

Attempt = tuple[str, tuple[int, ...]]


def verdict(cell: str, call: str, *arguments: int) -> int:
    """Return what the kernel does: the strictest answer of all filters (seccomp(2))."""
    answers = []
    for policy, pid in CELLS[cell]:
        chosen = install.load((policy,), "kill").filters[policy]
        answers.append(bpf.evaluate(install.for_process(chosen, pid, CELL_USER), NUMBERS[call], arguments))
    # KILL_PROCESS is the lowest as a signed number, ALLOW the highest.
    return min(answers, key=lambda answer: answer - (1 << 32) if answer >= 1 << 31 else answer)


def _each(calls: str, *arguments: int) -> list[Attempt]:
    return [(call, arguments) for call in calls.split()]


#: Who must not → what.
FORBIDDEN: list[tuple[tuple[str, ...], list[Attempt]]] = [
    (
        EVERYBODY,
        _each(
            "execve execveat ptrace process_vm_readv process_vm_writev pidfd_getfd mount umount2 pivot_root "
            "chroot unshare setns setuid setgid setreuid setregid setfsuid setfsgid mknod mknodat bpf "
            "perf_event_open userfaultfd keyctl add_key request_key "
            "init_module finit_module delete_module kexec_load kexec_file_load reboot open_by_handle_at "
            "name_to_handle_at memfd_secret personality modify_ldt iopl ioperm quotactl swapon swapoff acct "
            "fanotify_init syslog vmsplice process_madvise move_pages migrate_pages mbind remap_file_pages "
            "shmget shmat msgget semget mq_open fsopen open_tree move_mount"
        ),
    ),
    # Who somebody is: the supervisor makes its cells users of the launch and no others.
    (ALL_BUT_SUPERVISOR, _each("setresuid setresgid setgroups capset")),
    (
        ("supervisor",),
        [
            *[
                (call, tuple(other if each == place else CELL_USER for each in range(3)))
                for call in ("setresuid", "setresgid")
                for place in range(3)
                for other in (0, 1000, CELL_USER - 128, CELL_USER + 128, 0xFFFFFFFF)
            ],
            ("setgroups", (1, 0x7F0000000000)),
        ],
    ),
    # Rings are made by device cells only, and by none whose engines are made; with restrictions alone.
    (
        (*WORKERS, *CONTROLLERS),
        _each("io_uring_setup io_uring_enter") + [("io_uring_register", (5, what)) for what in range(32)],
    ),
    (("device",), _each("io_uring_setup", 128)),
    (DEVICE_CELLS, [("io_uring_register", (5, what)) for what in (0, 1, 3, 5, 7, 9, 10, 13, 15, 17, 20, 22, 26)]),
    (("device",), [("io_uring_register", (5, what)) for what in (2, 4, 11, 12, 0x80000006)]),
    (DEVICE_CELLS, [("io_uring_enter", (5, 1, 0, flags, 0)) for flags in (2, 4, 8, 16, 32, 64, 3)]),
    (DEVICE_CELLS, [("io_uring_enter", (5, 1, 0, 0, 0x7F0000000000))]),
    # A lock of a file that it would have to wait for would stop the control plane: whoever holds it decides.
    (CONTROLLERS, [("flock", (5, operation)) for operation in (0, 1, 2)]),
    # What is behind a drive: a file never grows by fallocate, loses and shares no range; no RWF_HIPRI, RWF_APPEND …
    (DEVICE_CELLS, [("fallocate", (5, mode, 0, 4096)) for mode in (1, 2, 8, 0x10, 0x20, 0x40, 0x41)]),
    # But for an overlay that is made before the second filter.
    (("device",), [("fallocate", (5, 0, 0, 4096)), *_each("ftruncate")]),
    (DEVICE_CELLS, [("pwritev2", (5, 0, 1, 0, 0, flags)) for flags in (1, 4, 8, 16, 32, 64)]),
    (DEVICE_CELLS, [("preadv2", (5, 0, 1, 0, 0, flags)) for flags in (1, 2, 4, 8, 64)]),
    (DEVICE_CELLS, [("lseek", (5, 0, whence)) for whence in (0, 1, 3, 4)]),
    # Processes and threads: no fork in a cell, no thread once it is sealed; no namespace by clone.
    (
        ALL_BUT_SUPERVISOR,
        [("fork", ()), ("vfork", ()), ("clone", (0x01200011,)), ("clone", (0x20000000,)), ("clone", (0x11,))],
    ),
    (
        EVERYBODY,
        [("clone", (0x01200011 | bits,)) for bits in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x80000000)],
    ),
    (RUNNING, [("clone", (0x003D0F00,)), ("clone3", ()), ("seccomp", (1, 1)), ("seccomp", (1, 8)), ("prctl", (22, 2))]),
    # Signals: a worker to its own threads, and only the kick; the controller by pidfd.
    (
        ALL_BUT_SUPERVISOR,
        [
            *[
                (call, (target, number, number))
                for call in ("kill", "tkill", "rt_sigqueueinfo")
                for target in (1, PID, OTHER)
                for number in (9, 34)
            ],
            *[
                ("tgkill", (target, target, number))
                for target in (0, 1, SUPERVISOR_PID, OTHER, 0xFFFFFFFF)
                for number in (0, 6, 9, 34)
            ],
            ("tgkill", (PID, PID, 9)),
            ("pidfd_open", (1, 0)),
        ],
    ),
    (RUNNING, [("tgkill", (PID, PID, 6))]),
    (
        ("vmm", "vmm-setup"),
        [("tgkill", (PID, PID, 34)), ("pidfd_send_signal", (5, 34, 0, 0)), ("pidfd_send_signal", (5, 15))],
    ),
    (SPAWNED, _each("pidfd_send_signal", 5, 9)),
    (DEVICE_CELLS, [("tgkill", (PID, PID, 34))]),
    # Memory that can be executed; memory of others by name.
    (
        EVERYBODY,
        [(call, (0, 4096, prot, 0x22)) for call in ("mmap", "mprotect") for prot in (EXEC, RDWR | EXEC, 7, 1 | EXEC)],
    ),
    (ALL_BUT_SUPERVISOR, [("mmap", (0, 4096, RDWR | 0x01000000, 0x22)), ("mprotect", (0, 4096, RDWR | 0x02000000))]),
    (
        SPAWNED_RUNNING,
        [("mmap", (0, 4096, RDWR, flags, 5)) for flags in (0x1, 0x3, 0x11, 0x12, 0x2, 0x32, 0x2022, 0x8022, 0x40022)],
    ),
    (("vmm",), [("mmap", (0, 4096, RDWR, flags, 5)) for flags in (0x2, 0x12, 0x32, 0x2022, 0x8022, 0x40022)]),
    (
        SPAWNED_RUNNING,
        [("madvise", (0, 4096, advice)) for advice in (3, 8, 9, 10, 11, 12, 14, 16, 20, 21, 22, 23, 25, 100)],
    ),
    (("vmm",), [("madvise", (0, 4096, advice)) for advice in (3, 8, 10, 11, 12, 14, 20, 21, 22, 23, 100, 101)]),
    (SPAWNED, _each("memfd_create mlock mlockall mlock2 msync mincore pkey_mprotect")),
    (WORKERS, _each("fallocate ftruncate")),
    # Futexes: priority inheritance, requeue and the like.
    (
        RUNNING,
        [("futex", (0, op)) for op in (2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 0x83, 0x84, 0x85, 0x86, 0x8B, 0x8C, 0x8D)],
    ),
    # Files of a worker: none, by no name; of both: no directory or device is made.
    (
        SPAWNED,
        _each("open openat openat2 creat stat lstat access faccessat readlink readlinkat getcwd", AT_FDCWD, 1, 2),
    ),
    (
        ("vcpu",),
        [("newfstatat", (5, 0, 0, 0x1000)), ("newfstatat", (AT_FDCWD, 0, 0, 0)), *_each("fcntl fstat lseek statx")],
    ),
    (("device",), [("newfstatat", (AT_FDCWD, 0, 0, flags)) for flags in (0, 0x100)] + _each("statx")),
    (
        ALL_BUT_SUPERVISOR,
        _each(
            "mkdir mkdirat rmdir symlink symlinkat link linkat chmod fchmod fchmodat chown fchown fchownat utimensat "
            "setxattr fsetxattr truncate sendfile copy_file_range splice tee"
        ),
    ),
    (SPAWNED, _each("unlink unlinkat rename renameat getdents64 readv writev")),
    (WORKERS, _each("pread64 pwrite64 preadv pwritev preadv2 pwritev2 fdatasync fsync")),
    # What a shared open file is: a worker makes none blocking (fcntl F_SETFL without O_NONBLOCK, FIONBIO, FIOASYNC).
    (
        SPAWNED,
        [("fcntl", (5, 4, flags)) for flags in (0, 2, 0x400, 0x2000)] + [("ioctl", (5, c)) for c in (0x5421, 0x5452)],
    ),
    (ALL_BUT_SUPERVISOR, [("fcntl", (5, command, 0)) for command in (8, 10, 15, 1024, 1026, 1031, 6, 7, 37, 38)]),
    (SPAWNED_RUNNING, [("fcntl", (5, command, 0x800)) for command in (1, 2, 4, 1030, 1033, 1034)]),
    (("vcpu",), [("fcntl", (5, 3, 0))]),
    # Terminals and devices: TIOCSTI, TIOCSCTTY, TIOCLINUX, FIONCLEX.
    (EVERYBODY, [("ioctl", (0, code)) for code in (0x5412, 0x540E, 0x541C, 0x5450, 0x5437)]),
    (SPAWNED, [("ioctl", (0, code)) for code in (0x5401, 0x5402, 0x540F)]),
    # Sockets: UNIX streams only, in a running worker none; no option is set, none that gives a pidfd or groups is read.
    (EVERYBODY, [("socket", (family, kind)) for family in (2, 10, 16, 17, 31, 38, 40, 44) for kind in (1, 2, 3)]),
    (
        ALL_BUT_SUPERVISOR,
        [("socket", (1, kind)) for kind in (2, 3, 5, 0x80002, 0x80005, 0x801)] + _each("socketpair accept"),
    ),
    (
        SPAWNED_RUNNING,
        _each("socket connect bind listen accept4 getsockopt getsockname getpeername shutdown", 1, 0x80001),
    ),
    (SPAWNED, _each("bind listen accept accept4")),
    (CONTROLLERS, _each("connect")),
    (ALL_BUT_SUPERVISOR, [("setsockopt", (5, SOL_SOCKET, option)) for option in (26, 27, 50, 51, 7, 32, 36, 42)]),
    (ALL_BUT_SUPERVISOR, [("getsockopt", (5, SOL_SOCKET, option)) for option in (59, 77, 31, 26, 52)]),
    (ALL_BUT_SUPERVISOR, [("getsockopt", (5, level, 17)) for level in (0, 6, 41, 263, 270)]),
    (
        RUNNING,
        [("sendto", (5, 0, 1, 0, 0x7F0000000000, 110)), ("sendto", (5, 0, 1, 1)), ("sendto", (5, 0, 1, 0x20000000))],
    ),
    (RUNNING, [("recvfrom", (5, 0, 1, flags)) for flags in (1, 2, 0x40, 0x2000)]),
    (RUNNING, [("recvfrom", (5, 0, 1, 0, 0x7F0000000000))]),
    (ALL_BUT_SUPERVISOR, [("recvmsg", (5, 0, flags)) for flags in (0, 1, 2, 0x2000, 0x40000001)]),
    (SPAWNED_RUNNING, _each("sendmsg", 5, 0, 0x4000)),
    (
        ALL_BUT_SUPERVISOR,
        [("sendmsg", (5, 0, flags)) for flags in (1, 0x20000000, 0x4000000)] + _each("sendmmsg recvmmsg"),
    ),
    # Others' scheduling and limits, and the own process's walls.
    (
        RUNNING,
        _each("sched_setaffinity sched_setattr setpriority ioprio_set sched_getattr prlimit64 setrlimit getrlimit"),
    ),
    (
        ALL_BUT_SUPERVISOR,
        [("prlimit64", (1, 6)), ("prlimit64", (0, 7)), ("setrlimit", (7,)), ("prctl", (4, 1)), ("prctl", (38, 0))],
    ),
    (RUNNING, [("prctl", (option, 0)) for option in (1, 4, 8, 23, 24, 28, 35, 36, 38, 47, 52)]),
    (
        SPAWNED_RUNNING,
        _each("timer_create timerfd_create eventfd2 epoll_create1 dup dup2 dup3 pipe2 inotify_init1 signalfd4"),
    ),
    # KVM: only on what there is; nothing that configuration alone needs.
    (
        ("vcpu",),
        [
            ("ioctl", (5, code))
            for code in (
                0xAE01,
                0xAE41,
                0x4020AE46,
                0xAE47,
                0x4008AE48,
                0x4068AEA3,
                0x4008AE90,
                0xAE60,
                0x4040AE77,
                0xAE03,
                0x41A0AE8D,
                0xC00CAEE0,
                0x4004AE86,
                0xAE9A,
                0xC008AEBA,
                0x4018AEBD,
                0x40A0AE49,
            )
        ],
    ),
    ((*CONTROLLERS, *DEVICE_CELLS), [("ioctl", (5, code)) for code in range(0xAE00, 0xAEFF)]),
    (
        (*CONTROLLERS, *DEVICE_CELLS),
        [("ioctl", (5, code)) for code in (0x4020AE46, 0x4020AE76, 0x4040AE79, 0x4008AE6A)],
    ),
    # Of a block device only its size: BLKDISCARD, BLKROSET, BLKRRPART, SG_IO.
    (DEVICE_CELLS, [("ioctl", (5, code)) for code in (0x1277, 0x125D, 0x125F, 0x2285, 0x1261)]),
]
#: A cell → what it must be able to do all the same, or it could not work.
NEEDED: dict[str, list[Attempt]] = {
    "vcpu": [
        ("ioctl", (5, 0xAE80)),
        ("tgkill", (PID, PID, 34)),
        ("futex", (0, 0x80)),
        ("recvmsg", (5, 0, 0x40000000)),
        ("mmap", (0, 4096, RDWR, 0x22)),
        ("ioctl", (5, 0xFFFFFFFF8090AE81)),
        ("read", ()),
        ("restart_syscall", ()),
    ],
    "vcpu-setup": [("ioctl", (5, 0xAE80)), ("clone", (0x003D0F00,)), ("seccomp", (1, 1)), ("tgkill", (PID, PID, 6))],
    "vmm": [
        ("openat", (AT_FDCWD, 0, 0x80000)),
        ("socket", (1, 0x80001)),
        ("fcntl", (5, 4, 0x802)),
        ("ioctl", (5, 0x5421)),
    ],
    "device": [
        ("preadv2", (5, 0, 1, 0, 0, 0)),
        ("pwritev2", (5, 0, 1, 0, 0, 2)),
        ("fdatasync", (5,)),
        ("fallocate", (5, 3, 0, 4096)),
        ("io_uring_enter", (5, 1, 0, 0, 0)),
        ("io_uring_register", (5, 6)),
        ("getrandom", (0, 1, 1)),
        ("recvmsg", (5, 0, 0x40000000)),
        ("read", ()),
        ("write", ()),
        ("restart_syscall", ()),
    ],
    "device-setup": [
        ("clone", (0x003D0F00,)),
        ("mmap", (0, 4096, RDWR, 0x1, 5)),
        ("io_uring_setup", (128,)),
        ("io_uring_register", (5, 11)),
        ("seccomp", (1, 1)),
        ("tgkill", (PID, PID, 6)),
    ],
    "supervisor": [
        ("clone", (0x01200011,)),
        ("pidfd_send_signal", (5, 9)),
        ("openat", (5, 0, 0x80000)),
        ("setgroups", (0, 0x7F0000000000)),
        ("setresgid", (CELL_USER,) * 3),
        ("setresuid", (CELL_USER + 127,) * 3),
    ],
}


@pytest.mark.parametrize("cell", CELLS)
def test_what_must_not_be_possible_is_not(cell: str) -> None:
    attempts = [attempt for cells, attempts in FORBIDDEN if cell in cells for attempt in attempts]
    assert len(attempts) >= 60
    possible = [
        (call, tuple(map(hex, arguments)))
        for call, arguments in attempts
        if verdict(cell, call, *arguments) in (bpf.RET_ALLOW, bpf.RET_ERRNO)  # RET_ERRNO | 0 says that it was done
    ]
    assert not possible


@pytest.mark.parametrize("cell", NEEDED)
def test_what_a_cell_needs_is_possible(cell: str) -> None:
    for call, arguments in NEEDED[cell]:
        assert verdict(cell, call, *arguments) == bpf.RET_ALLOW, (call, arguments)


def test_the_supervisor_alone_could_kick_others() -> None:
    """The one hole of its filter, which workers inherit: each worker's own filters close it from its fork on."""
    assert verdict("supervisor", "tgkill", OTHER, OTHER, 34) == bpf.RET_ALLOW
    assert verdict("vcpu-setup", "tgkill", OTHER, OTHER, 34) == bpf.RET_KILL_PROCESS
    assert verdict("vcpu-setup", "tgkill", PID, PID, 34) == bpf.RET_ALLOW
