"""A real vhost-user back end (qemu-storage-daemon), and the guest's side of a device that it serves."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from base.event_manager import EventManager
from ipc.guest_memory import GuestMemory
from tests.harness.event_loop import run_until
from tests.harness.virtio_devices import Notifications
from tests.harness.virtqueues import DATA, RINGS, TABLES, guest_memory
from virtio import abi
from virtio.device import Activation
from virtio.driver import Buffer, Driver, Used, lay_out
from virtio.queue import QueueConfig
from virtio.vhost_user.block import VhostUserBlock

PROGRAM = "qemu-storage-daemon"
#: Bytes of guest memory for each request: header, status, data.
_STEP = 0x2000
_READY_SECONDS = 20


class Backend:
    """qemu-storage-daemon with one disk on a socket; ``iops`` makes it slow, so that requests are in flight."""

    def __init__(self, folder: Path, size: int, *, iops: int = 0, read_only: bool = False) -> None:
        self.disk = folder / "disk"
        self.path = folder / "socket"
        self.size = size
        self.iops = iops
        self.read_only = read_only
        if not self.disk.exists():
            self.disk.write_bytes(bytes(size))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which(PROGRAM)
        assert program is not None, f"{PROGRAM} is not there: ./dev setup installs it"
        self.path.unlink(missing_ok=True)
        node = "file"
        words = ["--blockdev", f"driver=file,node-name=file,filename={self.disk}"]
        if self.iops:
            words += ["--object", f"throttle-group,id=slow,limits.iops-total={self.iops}"]
            words += ["--blockdev", "driver=throttle,node-name=slowed,throttle-group=slow,file=file"]
            node = "slowed"
        writable = "off" if self.read_only else "on"
        words += [
            "--export",
            f"type=vhost-user-blk,id=e,node-name={node},addr.type=unix,addr.path={self.path},writable={writable}",
        ]
        self.process = subprocess.Popen([program, *words], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def connect(self) -> int:
        """Return a connected socket, once the program listens."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(self.path))
                return connection.detach()
            except OSError:
                connection.close()
                assert self.process is not None
                assert self.process.poll() is None, "the back end has ended"
                assert time.monotonic() < deadline, "the back end does not listen"
                select.select([], [], [], 0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


class VhostUserGuest:
    """A driver of one queue, of which the device never sees a request."""

    def __init__(self, memory: GuestMemory, fd: int, *, writeback: bool = True, size: int = 64) -> None:
        self.memory = memory
        self.losses: list[str] = []
        self.device = VhostUserBlock("disk", fd, writeback=writeback, lost=self.losses.append)
        self.notify = Notifications()
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.interrupt_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.device.use_eventfds((self.kick_fd,), self.interrupt_fd)
        self.events = EventManager()
        self.number = self.events.add_subscriber(self.device)
        self.config = QueueConfig(256)
        self.config.size = size
        assert lay_out(self.config, RINGS) <= TABLES

    def wait(self, done) -> None:
        """Run the device's loop until something is so."""
        run_until(self.events, done)

    def introduce(self) -> None:
        """Wait until the device knows its back end, or has lost it."""
        ready = self.device.ready
        self.wait(lambda: ready.done or self.losses)

    def activate(self, features: int | None = None) -> None:
        self.features = self.device.features() if features is None else features
        self.driver = Driver(self.memory, self.config, self.features, TABLES)
        self.queue = self.config.ready(self.memory, self.features)
        self.go_on()

    def go_on(self) -> None:
        """Activate with the queue as it is."""
        deferral = self.device.activate(Activation(self.memory, (self.queue,), self.features, self.notify))
        if deferral is not None:
            self.wait(lambda: deferral.done)

    def stop(self) -> None:
        deferral = self.device.stop()
        if deferral is not None:
            self.wait(lambda: deferral.done)

    def reconnect(self, backend: Backend) -> None:
        """After a loss: have another back end, and let the device know it."""
        self.losses.clear()
        backend.kill()
        backend.start()
        self.device.update_files([backend.connect()])
        self.introduce()

    def offer(self, slot: int, kind: int, sector: int, data: bytes | int = b"") -> int:
        """Offer a request, and kick; each has a slot of memory of its own. Return its head."""
        at = DATA + slot * _STEP
        self.memory.write(at, abi.VIRTIO_BLK_REQ.pack(kind, 0, sector))
        self.memory.write(at + 16, b"\xee")
        length = data if isinstance(data, int) else len(data)
        if isinstance(data, bytes):
            self.memory.write(at + 0x1000, data)
        body = [Buffer(at + 0x1000, length, kind == abi.VIRTIO_BLK_T_IN)] if length else []
        head = self.driver.add([Buffer(at, 16), *body, Buffer(at + 16, 1, True)], indirect=True)
        if self.driver.publish():
            os.eventfd_write(self.kick_fd, 1)
        return head

    def status(self, slot: int) -> int:
        return self.memory.read(DATA + slot * _STEP + 16, 1)[0]

    def data(self, slot: int, length: int) -> bytes:
        return self.memory.read(DATA + slot * _STEP + 0x1000, length)

    def take(self, backend: Backend | None = None) -> list[Used]:
        """Return what has come back, after an interrupt if there is nothing; the device's loop runs meanwhile.

        With a ``backend`` that may end by itself, there is another one then: qemu-storage-daemon 7.2 now and then hangs
        up when it is stopped or started with requests in flight.
        """
        found: list[Used] = []

        def done() -> bool:
            found.extend(self.driver.take_used())
            if not found and not self.driver.arm():
                select.select([self.interrupt_fd], [], [], 0.002)
                return bool(self.losses)
            return bool(found)

        self.wait(done)
        if not found and backend is not None:
            self.reconnect(backend)
            return self.take()
        assert found, f"the back end is lost: {self.losses}"
        for used in found:
            self.driver.free(used.head)
        return found

    def request(self, kind: int, sector: int, data: bytes | int = b"") -> int:
        """Do one request in slot 0; return its status."""
        self.offer(0, kind, sector, data)
        assert self.take()
        return self.status(0)

    def close(self) -> None:
        self.device.close()
        self.events.remove_subscriber(self.number)
        self.events.close()
        os.close(self.kick_fd)
        os.close(self.interrupt_fd)


@contextmanager
def vhost_user_guest(fd: int, **settings) -> Iterator[VhostUserGuest]:
    """A guest with a connected socket."""
    with guest_memory(4 << 20) as memory:
        made = VhostUserGuest(memory, fd, **settings)
        try:
            yield made
        finally:
            made.close()
