"""Debian's qemu-storage-daemon as a server of our ring: what the benchmark of block devices compares with.

The front end is as small as it gets (QEMU's documentation of the vhost-user protocol): it hands over guest
memory, one queue and its two eventfds, and takes no part in any request.
"""

from __future__ import annotations

import array
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from bench.measure import BenchError
from virtio.abi import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1
from virtio.queue import QueueConfig

PROGRAM = "qemu-storage-daemon"
_VERSION = 1
_GET_FEATURES, _SET_FEATURES, _SET_OWNER, _SET_MEM_TABLE = 1, 2, 3, 5
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE, _SET_VRING_KICK, _SET_VRING_CALL = 8, 9, 10, 12, 13
_GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES, _SET_VRING_ENABLE = 15, 16, 18
_F_PROTOCOL_FEATURES = 1 << 30
_PROTOCOL_F_CONFIG = 1 << 9
#: Where guest memory lies for the addresses of the rings: any number will do.
_USER = 1 << 40
_TIMEOUT = 20.0


class StorageDaemon:
    """One disk, served until it is closed; ``descriptors``: guest memory, kick, interrupt; ``pid`` is the daemon's."""

    def __init__(self, path: str, aio: str, descriptors: tuple[int, int, int], config: QueueConfig) -> None:
        self._folder = tempfile.mkdtemp(prefix="cellblock-bench-")
        address = f"{self._folder}/socket"
        export = f"type=vhost-user-blk,id=e,node-name=r,writable=on,iothread=io,addr.type=unix,addr.path={address}"
        self._process = subprocess.Popen(
            [
                PROGRAM, "--object", "iothread,id=io",
                "--blockdev", f"driver=file,node-name=f,filename={path},aio={aio}",
                "--blockdev", "driver=raw,node-name=r,file=f", "--export", export,
            ]
        )  # fmt: skip
        self.pid = self._process.pid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._connect(address)
            self._start(*descriptors, config)
        except (BenchError, OSError):
            self.close()
            raise

    def _connect(self, address: str) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while True:
            try:
                self._socket.connect(address)
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise BenchError(f"{PROGRAM} does not serve") from None
                time.sleep(0.01)

    def _send(self, request: int, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        header = struct.pack("<III", request, _VERSION, len(payload))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self._socket.sendmsg([header + payload], rights)

    def _ask(self, request: int) -> int:
        self._send(request)
        answer = self._socket.recv(20, socket.MSG_WAITALL)
        got, _, size, value = struct.unpack("<IIIQ", answer)
        if (got, size) != (request, 8):
            raise BenchError(f"{PROGRAM} answered request {request} with {answer!r}")
        return int(value)

    def _start(self, memory: int, kick: int, call: int, config: QueueConfig) -> None:
        self._send(_SET_OWNER)
        wanted = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC | _F_PROTOCOL_FEATURES
        features = self._ask(_GET_FEATURES) & wanted
        if features != wanted:
            raise BenchError(f"{PROGRAM} offers {features:#x} of {wanted:#x}")
        protocol = self._ask(_GET_PROTOCOL_FEATURES) & _PROTOCOL_F_CONFIG
        self._send(_SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
        self._send(_SET_FEATURES, struct.pack("<Q", features))
        size = os.fstat(memory).st_size
        self._send(_SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, 0, size, _USER, 0), (memory,))
        self._send(_SET_VRING_NUM, struct.pack("<II", 0, config.size))
        self._send(_SET_VRING_BASE, struct.pack("<II", 0, 0))
        rings = (_USER + config.descriptor_table, _USER + config.used_ring, _USER + config.available_ring)
        self._send(_SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, *rings, 0))
        self._send(_SET_VRING_CALL, struct.pack("<Q", 0), (call,))
        self._send(_SET_VRING_KICK, struct.pack("<Q", 0), (kick,))
        self._send(_SET_VRING_ENABLE, struct.pack("<II", 0, 1))
        self._ask(_GET_FEATURES)  # answered in order: everything before it is in force

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(Path(self._folder), ignore_errors=True)
