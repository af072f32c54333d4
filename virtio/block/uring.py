"""io_uring(7) from plain Python: system calls through ctypes, the rings as views of 32 and 64-bit words.

Only what a block engine needs: one ring, one registered file, and restricted to READ, WRITE and FSYNC on it, and to
the registration of another file in its place, before it is switched on; a process whose seccomp filter allows
io_uring_enter, and io_uring_register for that, can do no more with it. An entry takes a few stores, a batch one system
call. Layouts: linux/io_uring.h.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
from struct import Struct

SYS_IO_URING_SETUP = 425
SYS_IO_URING_ENTER = 426
SYS_IO_URING_REGISTER = 427
IORING_OFF_SQ_RING = 0
IORING_OFF_SQES = 0x10000000
IORING_SETUP_R_DISABLED = 1 << 6
IORING_SETUP_COOP_TASKRUN = 1 << 8
IORING_FEAT_SINGLE_MMAP = 1 << 0
IORING_ENTER_GETEVENTS = 1 << 0
IORING_CQ_EVENTFD_DISABLED = 1 << 0
IORING_REGISTER_FILES = 2
IORING_REGISTER_EVENTFD = 4
IORING_REGISTER_FILES_UPDATE = 6
IORING_REGISTER_RESTRICTIONS = 11
IORING_REGISTER_ENABLE_RINGS = 12
IORING_RESTRICTION_REGISTER_OP = 0
IORING_RESTRICTION_SQE_OP = 1
IORING_RESTRICTION_SQE_FLAGS_ALLOWED = 2
IORING_RESTRICTION_SQE_FLAGS_REQUIRED = 3
IORING_OP_FSYNC = 3
IORING_OP_READ = 22
IORING_OP_WRITE = 23
IOSQE_FIXED_FILE = 1 << 0
IOSQE_ASYNC = 1 << 4
IORING_FSYNC_DATASYNC = 1 << 0

#: struct io_uring_params: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, resv[3]; then
#: struct io_sqring_offsets (head, tail, ring_mask, ring_entries, flags, dropped, array, resv1, user_addr) and
#: struct io_cqring_offsets (head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1, user_addr).
_PARAMS = Struct("<10I 8IQ 8IQ")
_SQ_OFFSETS = 10
_CQ_OFFSETS = 19
assert _PARAMS.size == 120
#: struct io_uring_sqe: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, and 24 bytes that stay zero.
_SQE = Struct("<BBHiQQIIQ24x")
_SQE_SIZE = 64
assert _SQE.size == _SQE_SIZE
_CQE_SIZE = 16
#: struct io_uring_restriction: opcode (u16), what it is about (u8), padding.
_RESTRICTION = Struct("<HB13x")
assert _RESTRICTION.size == 16
_FILE = Struct("<i")
#: struct io_uring_files_update: offset, resv, fds (a pointer).
_FILES_UPDATE = Struct("<IIQ")
assert _FILES_UPDATE.size == 16

#: How long the kernel may take to make a thread.
WORKER_TIMEOUT_MS = 5000

#: It keeps the interpreter lock: the call does not wait, and a batch of reads from the page cache costs less than
#: giving the lock up for it.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def _call(number: int, *arguments: object) -> int:
    result: int = _syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


class Ring:
    """An io_uring whose only file is ``file``, and which signals ``event``, once that is switched on (:meth:`quiet`).

    Raises OSError: EPERM, EACCES or ENOSYS where the host does not want it, EINVAL from a kernel before 5.10, EAGAIN
    where no thread can be made: a request that has to wait would then never end.
    """

    def __init__(self, entries: int, file: int, event: int) -> None:
        self.fd = -1
        params = self._set_up(entries)
        try:
            self._map(params)
            self._register(IORING_REGISTER_FILES, _FILE.pack(file), 1)
            self._register(IORING_REGISTER_EVENTFD, _FILE.pack(event), 1)
            self._restrict()
            self._register(IORING_REGISTER_ENABLE_RINGS, None, 0)
            self._make_worker()
        except OSError:
            self.close()
            raise

    def _set_up(self, entries: int) -> tuple[int, ...]:
        block = bytearray(_PARAMS.size)
        for flags in (IORING_SETUP_COOP_TASKRUN, 0):  # Linux 5.19; then without
            _PARAMS.pack_into(block, 0, 0, 0, flags | IORING_SETUP_R_DISABLED, *[0] * 25)
            try:
                where = (ctypes.c_char * len(block)).from_buffer(block)
                self.fd = _call(SYS_IO_URING_SETUP, ctypes.c_uint(entries), where)
                break
            except OSError as error:
                if error.errno != errno.EINVAL or not flags:
                    raise
        os.set_inheritable(self.fd, False)
        return _PARAMS.unpack(block)

    def _map(self, params: tuple[int, ...]) -> None:
        self.entries, cq_entries = params[:2]
        if not params[5] & IORING_FEAT_SINGLE_MMAP:
            raise OSError(errno.ENOSYS, "io_uring of a kernel before 5.4")
        _, sq_tail, _, _, _, _, sq_array = params[_SQ_OFFSETS : _SQ_OFFSETS + 7]
        cq_head, cq_tail, cq_mask, _, _, cqes, cq_flags = params[_CQ_OFFSETS : _CQ_OFFSETS + 7]
        size = max(sq_array + 4 * self.entries, cqes + _CQE_SIZE * cq_entries)
        rings = mmap.mmap(self.fd, -(-size // 8) * 8, offset=IORING_OFF_SQ_RING)
        sqes = mmap.mmap(self.fd, _SQE_SIZE * self.entries, offset=IORING_OFF_SQES)
        self._words = memoryview(rings).cast("I")
        self._cqes = memoryview(rings)[cqes:].cast("Q")
        self._sqes = memoryview(sqes)
        # Places of the shared words: whoever writes one is the only one.
        self._sq_tail, self._cq_head, self._cq_tail, self._cq_flags = [
            offset // 4 for offset in (sq_tail, cq_head, cq_tail, cq_flags)
        ]
        self._mask = self.entries - 1
        self._cq_mask = self._words[cq_mask // 4]
        for index in range(self.entries):
            self._words[sq_array // 4 + index] = index
        self._tail = self._head = self._submitted = 0

    def _register(self, what: int, data: bytes | None, count: int) -> None:
        _call(SYS_IO_URING_REGISTER, ctypes.c_int(self.fd), ctypes.c_uint(what), data, ctypes.c_uint(count))

    def replace_file(self, file: int) -> None:
        """Have another file in the place of the one before. While nothing is in flight. Raises OSError."""
        number = ctypes.c_int(file)
        self._register(IORING_REGISTER_FILES_UPDATE, _FILES_UPDATE.pack(0, 0, ctypes.addressof(number)), 1)

    def _make_worker(self) -> None:
        """Have the kernel make the thread to which it gives what would wait (docs/adr/io-uring-in-a-cell.md).

        The first one stays as long as the ring does; in a sealed cell there is no other, for it can make no thread.
        """
        self.quiet(True)
        self.fill(IORING_OP_READ, 0, 0, 0, flags=0, user_data=0, how=IOSQE_ASYNC)
        self.submit()
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll(WORKER_TIMEOUT_MS)
        if [result for _, result in self.reap()] in ([], [-errno.ECANCELED]):
            raise OSError(errno.EAGAIN, "the kernel makes no thread for io_uring")

    def _restrict(self) -> None:
        rules = [(IORING_RESTRICTION_SQE_OP, op) for op in (IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC)]
        rules.append((IORING_RESTRICTION_REGISTER_OP, IORING_REGISTER_FILES_UPDATE))
        rules.append((IORING_RESTRICTION_SQE_FLAGS_REQUIRED, IOSQE_FIXED_FILE))
        rules.append((IORING_RESTRICTION_SQE_FLAGS_ALLOWED, IOSQE_FIXED_FILE | IOSQE_ASYNC))
        packed = b"".join([_RESTRICTION.pack(what, value) for what, value in rules])
        self._register(IORING_REGISTER_RESTRICTIONS, packed, len(rules))

    def fill(
        self, op: int, offset: int, address: int, length: int, *, flags: int, user_data: int, how: int = 0
    ) -> None:
        """Fill the next entry. The caller has counted: there is one. ``how``: IOSQE_ASYNC, or nothing."""
        place = (self._tail & self._mask) * _SQE_SIZE
        how |= IOSQE_FIXED_FILE
        _SQE.pack_into(self._sqes, place, op, how, 0, 0, offset, address, length, flags, user_data)
        self._tail = self._tail + 1 & 0xFFFF_FFFF

    def submit(self) -> None:
        """Hand the filled entries to the kernel. Raises OSError."""
        self._words[self._sq_tail] = self._tail
        while count := self._tail - self._submitted & 0xFFFF_FFFF:
            try:
                done = _call(
                    SYS_IO_URING_ENTER, ctypes.c_int(self.fd), ctypes.c_uint(count), ctypes.c_uint(0),
                    ctypes.c_uint(IORING_ENTER_GETEVENTS), ctypes.c_void_p(0), ctypes.c_size_t(0),
                )  # fmt: skip
            except OSError as error:
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                    raise
            else:
                self._submitted = self._submitted + done & 0xFFFF_FFFF

    def reap(self) -> list[tuple[int, int]]:
        """Return (user_data, result) of what was completed since."""
        head, count = self._head, self._words[self._cq_tail] - self._head & 0xFFFF_FFFF
        found = []
        cqes, mask = self._cqes, self._cq_mask
        for position in range(head, head + count):
            place = 2 * (position & mask)
            result = cqes[place + 1] & 0xFFFF_FFFF
            found.append((cqes[place], result - (1 << 32) if result >> 31 else result))
        if count:
            self._head = head + count & 0xFFFF_FFFF
            self._words[self._cq_head] = self._head
        return found

    def quiet(self, on: bool) -> None:
        """Switch the event off or on. After switching it on look at the completions once more."""
        self._words[self._cq_flags] = IORING_CQ_EVENTFD_DISABLED if on else 0

    def close(self) -> None:
        """The kernel finishes or cancels what is in flight. Harmless twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
