"""Attacks by way of what is behind a drive, and of the rings that read and write it."""

from __future__ import annotations

import errno

from base.lean_typing import Callable
from ipc.drills.calls import Attempt, call

# linux/falloc.h, linux/fs.h, linux/io_uring.h, scsi/sg.h.
_COLLAPSE_RANGE, _INSERT_RANGE = 0x08, 0x20
_RWF_HIPRI, _RWF_APPEND = 0x01, 0x10
_ENTER_SQ_WAKEUP, _ENTER_EXT_ARG, _ENTER_REGISTERED_RING = 2, 8, 16
_REGISTER_BUFFERS2, _REGISTER_PERSONALITY, _REGISTER_SYNC_CANCEL = 15, 9, 24
_BLKROSET, _BLKRRPART, _BLKDISCARD, _SG_IO = 0x125D, 0x125F, 0x1277, 0x2285
#: The kernel has decided to look at the descriptor, or at what is behind it: with a drive's it would do it.
_REACHED = (errno.EBADF, errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP)


def _reaches(name: str, *arguments: object) -> Attempt:
    return call(name, -1, *arguments, reached=_REACHED)


ATTEMPTS: dict[str, Attempt] = {
    "fallocate-grow": _reaches("fallocate", 0, 0, 4096),
    "fallocate-collapse": _reaches("fallocate", _COLLAPSE_RANGE, 0, 4096),
    "fallocate-insert": _reaches("fallocate", _INSERT_RANGE, 0, 4096),
    "pwritev2-append": _reaches("pwritev2", None, 0, 0, 0, _RWF_APPEND),
    "preadv2-poll": _reaches("preadv2", None, 0, 0, 0, _RWF_HIPRI),
    "copy-file-range": _reaches("copy_file_range", None, -1, None, 4096, 0),
    "sendfile": _reaches("sendfile", -1, None, 4096),
    "block-discard": _reaches("ioctl", _BLKDISCARD, bytes(16)),
    "block-read-only": _reaches("ioctl", _BLKROSET, bytes(4)),
    "block-partitions": _reaches("ioctl", _BLKRRPART, 0),
    "scsi-command": _reaches("ioctl", _SG_IO, bytes(88)),
    "io-uring-wake-poller": _reaches("io_uring_enter", 0, 0, _ENTER_SQ_WAKEUP, None, 0),
    "io-uring-enter-extended": _reaches("io_uring_enter", 0, 0, _ENTER_EXT_ARG, None, 0),
    "io-uring-enter-registered": _reaches("io_uring_enter", 0, 0, _ENTER_REGISTERED_RING, None, 0),
    "io-uring-buffers": _reaches("io_uring_register", _REGISTER_BUFFERS2, None, 0),
    "io-uring-personality": _reaches("io_uring_register", _REGISTER_PERSONALITY, None, 0),
    "io-uring-cancel": _reaches("io_uring_register", _REGISTER_SYNC_CANCEL, None, 1),
}
AIMED: dict[str, Callable[[str], str]] = {}
