"""System calls as an attacker makes them: by number, with any arguments, without the C library's care. x86-64 only."""

from __future__ import annotations

import ctypes
import errno
import os

from base.lean_typing import Callable

#: Numbers: the kernel's syscall_64.tbl. A test compares them with those that the reports name.
# fmt: off
NUMBERS = {
    "dup": 32, "dup2": 33, "clone": 56, "fork": 57, "vfork": 58, "kill": 62, "uname": 63, "semget": 64,
    "msgget": 68, "fcntl": 72, "ftruncate": 77, "truncate": 76, "chdir": 80, "rename": 82, "mkdir": 83, "rmdir": 84,
    "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "chown": 92, "umask": 95, "ptrace": 101, "syslog": 103,
    "setuid": 105, "setgid": 106, "setpgid": 109, "setsid": 112, "setreuid": 113, "setregid": 114, "setgroups": 116,
    "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capset": 126, "rt_sigqueueinfo": 129,
    "mknod": 133, "uselib": 134, "personality": 135, "statfs": 137, "sysfs": 139, "setpriority": 141,
    "sched_setscheduler": 144, "sched_getscheduler": 145, "sched_getparam": 143, "mlock": 149, "mlockall": 151,
    "vhangup": 153, "modify_ldt": 154, "pivot_root": 155, "prctl": 157, "arch_prctl": 158, "adjtimex": 159,
    "chroot": 161, "sync": 162, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167,
    "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "setxattr": 188, "getxattr": 191, "tkill": 200,
    "set_thread_area": 205, "io_setup": 206, "lookup_dcookie": 212, "remap_file_pages": 216, "timer_create": 222,
    "clock_settime": 227, "tgkill": 234, "mbind": 237, "set_mempolicy": 238, "mq_open": 240, "kexec_load": 246,
    "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251, "inotify_init": 253,
    "inotify_add_watch": 254, "migrate_pages": 256, "openat": 257, "mknodat": 259, "unshare": 272,
    "get_robust_list": 274, "splice": 275, "tee": 276, "vmsplice": 278, "move_pages": 279, "inotify_init1": 294,
    "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314, "sched_getattr": 315,
    "seccomp": 317, "memfd_create": 319, "kexec_file_load": 320, "bpf": 321, "execveat": 322, "userfaultfd": 323,
    "pkey_mprotect": 329, "pkey_alloc": 330, "statx": 332, "rseq": 334, "pidfd_send_signal": 424,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435,
    "close_range": 436, "openat2": 437, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "landlock_create_ruleset": 444, "landlock_restrict_self": 446, "memfd_secret": 447, "process_mrelease": 448,
    "set_mempolicy_home_node": 450, "map_shadow_stack": 453, "statmount": 457, "listmount": 458,
    "lsm_set_self_attr": 460, "sched_setaffinity": 203, "shmget": 29, "shmat": 30, "mmap": 9, "mprotect": 10,
    "madvise": 28, "mremap": 25, "ioctl": 16, "socket": 41, "connect": 42, "socketpair": 53, "setsockopt": 54,
    "getsockopt": 55, "sendmsg": 46, "execve": 59, "setrlimit": 160, "utimensat": 280, "syncfs": 306, "getcwd": 79,
    "fallocate": 285, "preadv2": 327, "pwritev2": 328, "copy_file_range": 326, "sendfile": 40,
}
# fmt: on
#: What an x32 program adds to a number.
X32_BIT = 0x40000000

libc = ctypes.CDLL(None, use_errno=True)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long

Attempt = Callable[[], str]


def refuse(number: int) -> OSError:
    """Return the error with which the kernel has refused."""
    return OSError(number, os.strerror(number))


def system_call(number: int, *arguments: object) -> int:
    """Make a system call by its number. Raises OSError with the kernel's errno.

    Arguments are numbers, bytes or memory of ctypes (passed by address), None (a null pointer), or a function that is
    asked for one of them now.
    """
    converted: list[object] = [ctypes.c_long(number)]
    for argument in arguments:
        value = argument() if callable(argument) else argument
        if isinstance(value, int):
            converted.append(ctypes.c_long(value))
        elif isinstance(value, bytes):
            converted.append(ctypes.c_char_p(value))
        elif value is None:
            converted.append(ctypes.c_void_p(None))
        else:
            assert isinstance(value, ctypes.Array)
            converted.append(ctypes.cast(value, ctypes.c_void_p))
    result = int(_syscall(*converted))
    if result == -1:
        raise refuse(ctypes.get_errno())
    return result


def call(name: str, *arguments: object, reached: tuple[int, ...] = ()) -> Attempt:
    """Return an attempt that makes one system call.

    ``reached`` are the errnos that the kernel gives only after it has decided that the caller may do this: with them
    the attempt has succeeded as well, for arguments that do harm would do it.
    """

    def attempt() -> str:
        try:
            return f"returned {system_call(NUMBERS[name], *arguments)}"
        except OSError as error:
            if error.errno in reached:
                return f"reached: {errno.errorcode[error.errno]}"
            raise

    return attempt


def buffer(content: bytes, size: int = 0) -> ctypes.Array[ctypes.c_char]:
    """Return memory with this content that a system call may write to."""
    return ctypes.create_string_buffer(content, max(size, len(content)))
