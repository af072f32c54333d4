"""Attacks by way of the file system: out of the root, into /proc, /sys and devices, mounts, handles, quotas."""

from __future__ import annotations

import errno
import os
import stat

from base.lean_typing import Callable
from ipc.drills.calls import NUMBERS, Attempt, buffer, call, refuse, system_call

_AT_FDCWD = -100
_HERE = b"."
_NOWHERE = b"/nowhere"


def _open() -> str:
    try:
        descriptor = os.open("/etc/passwd", os.O_RDONLY)
        what = "/etc/passwd"
    except FileNotFoundError:
        descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        what = f"/ with {sorted(os.listdir(descriptor))}"
    os.close(descriptor)
    return what


def _pid_file() -> str:
    for each in os.listdir("/"):
        if each.endswith(".pid"):
            return each
    raise refuse(errno.ENOENT)


def _unlink_pid_file() -> str:
    name = _pid_file()
    os.unlink(f"/{name}")
    return name


def _replace_pid_file() -> str:
    name = _pid_file()
    with open("/forged", "w", encoding="ascii") as file:
        file.write("1")
    os.rename("/forged", f"/{name}")
    return name


def _opens(path: bytes, flags: int = os.O_RDONLY) -> Attempt:
    def attempt() -> str:
        os.close(system_call(NUMBERS["openat"], _AT_FDCWD, path, flags | os.O_NONBLOCK, 0o600))
        return path.decode()

    return attempt


def _read_path(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return f"{path}: {os.read(descriptor, 60)!r}"
    finally:
        os.close(descriptor)


def _write_path(path: str) -> str:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        return f"{path}: {os.write(descriptor, b'drill')} bytes"
    finally:
        os.close(descriptor)


def _large_file(path: str) -> str:
    """Write a byte 1 MiB into a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        return f"{path}: {os.write(descriptor, b'x')} byte at 1 MiB"
    finally:
        os.close(descriptor)


_NO_ENTRY = (errno.ENOENT,)
_FILE_HANDLE = b"\x08\0\0\0\x01\0\0\0" + bytes(8)  # struct file_handle: 8 bytes, type 1

ATTEMPTS: dict[str, Attempt] = {
    "open": _open,
    "unlink-pid-file": _unlink_pid_file,
    "replace-pid-file": _replace_pid_file,
    "open-kvm": _opens(b"/dev/kvm", os.O_RDWR),
    "open-tun": _opens(b"/dev/net/tun", os.O_RDWR),
    "open-userfaultfd": _opens(b"/dev/userfaultfd", os.O_RDWR),
    "open-passwd": _opens(b"/etc/passwd"),
    "open-above-root": _opens(b"/../../../../etc/shadow"),
    "open-proc-memory": _opens(b"/proc/self/mem", os.O_RDWR),
    "open-proc-maps": _opens(b"/proc/self/maps"),
    "open-proc-init": _opens(b"/proc/1/environ"),
    "open-proc-descriptor": _opens(b"/proc/self/fd/2", os.O_WRONLY),
    "open-core-pattern": _opens(b"/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "open-sysrq": _opens(b"/proc/sysrq-trigger", os.O_WRONLY),
    "open-sys": _opens(b"/sys/kernel/uevent_helper", os.O_WRONLY),
    "open-debugfs": _opens(b"/sys/kernel/debug"),
    "open-cgroup": _opens(b"/sys/fs/cgroup/cgroup.procs", os.O_WRONLY),
    "open-cgroup-v1": _opens(b"/sys/fs/cgroup/pids/cgroup.procs", os.O_WRONLY),
    "open-dev-mem": _opens(b"/dev/mem", os.O_RDWR),
    "open-terminal": _opens(b"/dev/tty", os.O_RDWR),
    "open-device-by-number": call("mknod", b"/drill-device", stat.S_IFCHR | 0o600, os.makedev(1, 1)),
    "mknodat-block": call("mknodat", _AT_FDCWD, b"/drill-block", stat.S_IFBLK | 0o600, os.makedev(259, 0)),
    "chroot": call("chroot", b"/"),
    "chdir": call("chdir", b"/.."),
    "getcwd": call("getcwd", buffer(b"", 100), 100),
    "pivot-root": call("pivot_root", _HERE, _HERE, reached=(errno.EINVAL, errno.EBUSY)),
    "mount-tmpfs": call("mount", b"drill", b"/", b"tmpfs", 0, None),
    "mount-proc": call("mount", b"proc", b"/", b"proc", 0, None),
    "mount-remount": call("mount", None, b"/", None, 0x1020, None, reached=(errno.EINVAL,)),
    "umount": call("umount2", b"/", 2, reached=(errno.EINVAL,)),
    "open-tree": call("open_tree", _AT_FDCWD, b"/", 1),
    "move-mount": call("move_mount", _AT_FDCWD, b"/", _AT_FDCWD, b"/", 0, reached=(errno.EINVAL,)),
    "fsopen": call("fsopen", b"tmpfs", 0),
    "fsconfig": call("fsconfig", -1, 6, None, None, 0, reached=(errno.EBADF, errno.EINVAL)),
    "fsmount": call("fsmount", -1, 0, 0, reached=(errno.EBADF,)),
    "fspick": call("fspick", _AT_FDCWD, b"/", 0),
    "mount-setattr": call("mount_setattr", _AT_FDCWD, b"/", 0, bytes(32), 32),
    "name-to-handle": call("name_to_handle_at", _AT_FDCWD, b"/", buffer(b"\x80\0\0\0", 256), buffer(b"", 4), 0),
    "open-by-handle": call("open_by_handle_at", _AT_FDCWD, buffer(_FILE_HANDLE), 0, reached=(errno.ESTALE,)),
    "fanotify": call("fanotify_init", 0, 0),
    "fanotify-unprivileged": call("fanotify_init", 0x200, 0),
    "inotify": call("inotify_init1", 0),
    "inotify-watch": call("inotify_add_watch", -1, b"/", 2, reached=(errno.EBADF,)),
    "lookup-dcookie": call("lookup_dcookie", 0, 0, buffer(b"", 16), 16, reached=(errno.EINVAL,)),
    "quotactl": call("quotactl", 0x80000100, None, 0, 0, reached=(errno.ENODEV,)),
    "acct": call("acct", b"/drill-accounting", reached=_NO_ENTRY),
    "swapon": call("swapon", b"/drill-swap", 0, reached=_NO_ENTRY),
    "swapoff": call("swapoff", b"/drill-swap", reached=_NO_ENTRY),
    "link": call("link", b"/", b"/drill-link"),
    "symlink": call("symlink", b"/etc", b"/drill-symlink"),
    "mkdir": call("mkdir", b"/drill-directory", 0o755),
    "rmdir": call("rmdir", b"/drill-directory", reached=_NO_ENTRY),
    "chmod": call("chmod", b"/", 0o777),
    "chown": call("chown", b"/", 0, 0),
    "setxattr": call("setxattr", b"/", b"user.drill", b"x", 1, 0),
    "getxattr": call("getxattr", b"/", b"user.drill", buffer(b"", 8), 8, reached=(errno.ENODATA,)),
    "truncate": call("truncate", b"/drill-file", 0, reached=_NO_ENTRY),
    "utimensat": call("utimensat", _AT_FDCWD, b"/", None, 0),
    "statfs": call("statfs", b"/", buffer(b"", 256)),
    "sync": call("sync"),
    "umask": call("umask", 0),
    "statmount": call("statmount", buffer(b"", 64), buffer(b"", 64), 64, 0, reached=(errno.EINVAL,)),
    "listmount": call("listmount", buffer(b"", 64), buffer(b"", 64), 8, 0, reached=(errno.EINVAL,)),
}
AIMED: dict[str, Callable[[str], str]] = {"read": _read_path, "write": _write_path, "large-file": _large_file}
