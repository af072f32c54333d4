"""Plays the controller for one real worker process: forks ``vcpu_worker.main.run``, speaks ipc's own classes."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import zmq

from ipc import descriptors, device_pages, exit_ring
from ipc.channel import Channel, PairChannel
from ipc.errors import ChannelError
from ipc.launch_plan import ENDPOINT_BOUND, ROLE_VCPU, Assignment, LaunchPlan, endpoint
from ipc.messages.descriptors import DESCRIPTORS, DevicePages, ExitRing, GuestMemory, Interrupt, VcpuDescriptor
from ipc.messages.records import WORKER, BootRegisters, Failed, Window
from ipc.messages.vm import MAX_INTERRUPTS_AT_ONCE, AddInterrupts, MapMemory, SetWindows, VmChanged
from ipc.messages.worker import (
    Configure,
    Configured,
    Finish,
    Finished,
    Hello,
    Pause,
    Paused,
    Resume,
    Resumed,
    VcpuExited,
    Welcome,
)
from ipc.shared_memory import create_published, create_shared, map_shared
from tests.guests.build import build
from vcpu_worker import main

MEMORY_SIZE = 4 << 20
PARAMETERS = 0x20000
#: How long anything may take before the harness gives up: a hang must end a test, nothing is measured by it.
PATIENCE_S = 60.0

POSTED, CALLED, READ_BACK, LOCAL, ECHO = 0x600, 0x604, 0x608, 0x60C, 0x610
FAILED, DONE = 0x6F0, 0x6F4
MMIO_POSTED, MMIO_CALLED, MMIO_READ, MMIO_LOCAL = 0x2000_0000, 0x2000_1000, 0x2000_2000, 0x2000_3000

MODES = "exits storm local spin ticks sleeper triple_fault halt_for_good run_device_memory crossing".split()

_PML4, _PDPT, _DIRECTORY, _GDT, _IDT = 0x9000, 0xA000, 0xB000, 0x500, 0x520
_GDT_ENTRIES = (0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x008F_8B00_0000_FFFF)

Reply = TypeVar("Reply")


def boot_registers(entry: int) -> BootRegisters:
    """Long mode with a 1 GiB identity map, as the 64-bit boot protocol has it."""
    return BootRegisters(
        rip=entry,
        rsp=0x8FF0,
        rbp=0x8FF0,
        rsi=0x7000,
        rbx=0,
        rflags=2,
        cr0=0x8000_0011,
        cr3=_PML4,
        cr4=0x20,
        efer=0x500,
        gdt_base=_GDT,
        gdt=_GDT_ENTRIES,
        idt_base=_IDT,
        idt_limit=7,
    )


def load_elf(memory: mmap.mmap, path: Path) -> int:
    """Put the loadable segments of a 64-bit ELF into memory; return its entry point."""
    image = path.read_bytes()
    entry, headers = struct.unpack_from("<QQ", image, 24)
    size, count = struct.unpack_from("<HH", image, 54)
    for number in range(count):
        kind, _, offset, _, address, length = struct.unpack_from("<IIQQQQ", image, headers + number * size)
        if kind == 1:
            memory[address : address + length] = image[offset : offset + length]
    return int(entry)


def write_boot_structures(memory: mmap.mmap) -> None:
    """Page tables (1 GiB identity in 2 MiB pages) and GDT."""
    struct.pack_into("<4Q", memory, _GDT, *_GDT_ENTRIES)
    struct.pack_into("<Q", memory, _PML4, _PDPT | 3)
    struct.pack_into("<Q", memory, _PDPT, _DIRECTORY | 3)
    for number in range(512):
        struct.pack_into("<Q", memory, _DIRECTORY + 8 * number, number << 21 | 0x83)


def nothing_written(entry, string):
    """A device of which the test expects nothing: what is read is 0."""
    return 0


class ChecksCounts:
    """The device: every write must carry the next count; reads return the last one."""

    def __init__(self) -> None:
        self.count = 0
        self.errors: list[str] = []
        self.failures: list[int] = []
        self.done: list[int] = []
        self.echo = b""
        self.strings: list[tuple[int, int, int]] = []
        self.calls: list[int] = []
        self.record = False

    def __call__(self, entry: exit_ring.Entry, string: memoryview) -> int:
        if entry.address == ECHO:
            return self._echo(entry, string)
        if entry.kind in (exit_ring.KIND_PIO_READ, exit_ring.KIND_MMIO_READ):
            return self.count
        if entry.address == FAILED:
            self.failures.append(entry.data)
        elif entry.address == DONE:
            self.done.append(entry.data)
        else:
            self._counted(entry)
        return 0

    def _echo(self, entry: exit_ring.Entry, string: memoryview) -> int:
        """A queue of bytes. KVM cuts REP INS and REP OUTS as it likes; pieces of one element are plain accesses."""
        length = entry.count * entry.size
        self.strings.append((entry.kind, entry.size, entry.count))
        if entry.kind == exit_ring.KIND_PIO_STRING_WRITE:
            self.echo += string[:length]
        elif entry.kind == exit_ring.KIND_PIO_WRITE:
            self.echo += entry.data.to_bytes(entry.size, "little")
        else:
            head, self.echo = self.echo[:length], self.echo[length:]
            if entry.kind == exit_ring.KIND_PIO_READ:
                return int.from_bytes(head, "little")
            string[:length] = head
        return 0

    def _counted(self, entry: exit_ring.Entry) -> None:
        if self.record:
            self.calls.append(entry.data)
            return
        self.count += 1
        expected = self.count & (1 << 8 * entry.size) - 1
        synchronous = entry.address in (CALLED, MMIO_CALLED)
        if entry.data != expected or bool(entry.flags) != synchronous:
            self.errors.append(f"{entry.address:#x}: {entry.data:#x} instead of {expected:#x}, flags {entry.flags}")


Device = Callable[[exit_ring.Entry, memoryview], int]


class Walls:
    """In the place of the jailer's seal: no walls; what is passed is called at the two stages."""

    def __init__(
        self, verified: Callable[[], None] = lambda: None, tightened: Callable[[], None] = lambda: None
    ) -> None:
        self.await_verified = verified
        self.tighten = tightened

    def await_tightened(self) -> None:
        """Nobody reads anything back."""


class Controller:
    """One worker and everything the controller has of it. A context manager: at its end the worker is gone."""

    def __init__(
        self,
        directory: Path,
        device: Device,
        *,
        mode: str = "exits",
        number: int = 0,
        memory_size: int = MEMORY_SIZE,
        interrupts: tuple[int, ...] = (),
        seal: Callable[[], None] = lambda: None,
        tighten: Callable[[], None] = lambda: None,
        affinity: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.device = device
        self._affinity = affinity
        self.events: list[VcpuExited] = []
        self.entries = 0
        self._replies: dict[int, Any] = {}
        self.hello: Hello | None = None
        self.status: int | None = None
        self.plan = _plan(str(directory))
        path = endpoint(str(directory), ROLE_VCPU, 0)
        self._upper, lower = descriptors.channel_pair()
        kvm_fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        # Everything that the child must not inherit threads of is made after the fork.
        self.pid = os.fork()
        if self.pid == 0:
            self._child(lower, kvm_fd, Walls(seal, tighten))
        lower.close()
        os.close(kvm_fd)
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self.channel = Channel(self.context, WORKER, self.plan.epoch)
        self.channel.bind(path)
        descriptors.send(self._upper, ENDPOINT_BOUND)
        self.memory_fd = create_shared("guest", memory_size)
        self.memory = map_shared(self.memory_fd, memory_size)
        self.memory_size = memory_size
        write_boot_structures(self.memory)
        self.entry = load_elf(self.memory, build("worker"))
        self.parameters = memoryview(self.memory)[PARAMETERS : PARAMETERS + 64].cast("Q")
        self.parameters[0], self.parameters[1] = MODES.index(mode), number
        self.interrupts = {gsi: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for gsi in interrupts}
        self._make_shared()
        self.descriptor_channel = PairChannel(self._upper, DESCRIPTORS, self.plan.epoch)
        self.run_page: mmap.mmap | None = None

    def _child(self, lower: socket.socket, kvm_fd: int, walls: Walls) -> None:
        status = 99
        try:
            self._upper.close()
            lower.setblocking(False)  # as the supervisor does
            status = main.run(self.plan, Assignment(0, (0,), (), self._affinity), lower, kvm_fd, walls)
        except Exception as error:  # before its seal; the jailer's code hands it to the supervisor
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            status = 1
        finally:
            os._exit(status)

    def _make_shared(self) -> None:
        self._page_fd, self._page_map = create_published("device-page", device_pages.DEVICE_PAGE_SIZE)
        self.page = device_pages.DevicePage(self._page_map)
        self._ring_fd = create_shared("ring", exit_ring.RING_SIZE)
        self._ring_map = map_shared(self._ring_fd, exit_ring.RING_SIZE)
        exit_ring.initialise(self._ring_map)
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.completion = os.eventfd(0, os.EFD_CLOEXEC)
        self.ring = exit_ring.ExitRingConsumer(self._ring_map, self.completion)
        ports = 0x20
        self.port_slot = self.page.allocate(ports)
        self.ports = (
            Window(POSTED, ports, self.port_slot),
            Window(FAILED, 8, self.page.allocate(8)),
        )
        for offset in range(4):
            self.page.publish(self.port_slot + offset, 0, device_pages.FLAG_WRITE_POSTED)
            self.page.publish(self.port_slot + LOCAL - POSTED + offset, 0x5A5B5C5D, device_pages.FLAG_READ_LOCAL)
        slots = [self.page.allocate(1) for _ in range(4)]
        self.page.publish(slots[0], 0, device_pages.FLAG_WRITE_POSTED)
        self.page.publish(slots[3], 0x1122_3344, device_pages.FLAG_READ_LOCAL)
        addresses = (MMIO_POSTED, MMIO_CALLED, MMIO_READ, MMIO_LOCAL)
        self.mmio = tuple(Window(address, 0x1000, slot) for address, slot in zip(addresses, slots, strict=True))

    # ------------------------------------------------------------ protocol

    def greet(self) -> None:
        """Wait for HELLO and answer it."""
        self.wait(lambda: self.hello is not None)
        self.channel.unlink()
        self.channel.send(Welcome())

    def configuration(self) -> Configure:
        """The Configure that fits this harness."""
        return Configure(
            vcpu_count=1,
            smt=False,
            vcpus=(0,),
            boot=boot_registers(self.entry),
            resumes_other=False,
        )

    def changes(self) -> list[Any]:
        """What the worker's VM gets before Configure."""
        gsis = tuple(self.interrupts)
        starts = range(0, len(gsis), MAX_INTERRUPTS_AT_ONCE)
        return [
            MapMemory(0, 0, self.memory_size, 0, own=False, read_only=False, track_dirty_pages=False),
            SetWindows(self.ports, self.mmio, last=True),
            *[AddInterrupts(gsis[start : start + MAX_INTERRUPTS_AT_ONCE]) for start in starts],
        ]

    def send_descriptors(self) -> None:
        """Everything that goes down before Configure."""
        self.descriptor_channel.send(GuestMemory(self.memory_size), fds=(self.memory_fd,))
        self.descriptor_channel.send(DevicePages(), fds=(self._page_fd,))
        self.descriptor_channel.send(ExitRing(0), fds=(self._ring_fd, self.doorbell, self.completion))
        for gsi, eventfd in self.interrupts.items():
            self.descriptor_channel.send(Interrupt(gsi), fds=(eventfd,))

    def prepare(self) -> None:
        """Everything that comes before Configure."""
        self.send_descriptors()
        for sequence in [self.submit(change) for change in self.changes()]:
            assert self.collect(sequence) == VmChanged()

    def configure(self) -> Configured:
        """Greet and configure."""
        self.greet()
        self.prepare()
        configured = self.request(self.configuration(), Configured)
        assert self.hello is not None
        self._upper.setblocking(False)
        envelope, owned = self.descriptor_channel.receive(1)
        with owned:
            assert envelope is not None and isinstance(envelope.message, VcpuDescriptor)
            descriptor = owned.take()
            self.run_page = mmap.mmap(descriptor, self.hello.vcpu_mmap_size, mmap.MAP_SHARED, mmap.PROT_READ)
            os.close(descriptor)
        return configured

    def resume(self) -> None:
        """Let it run."""
        self.request(Resume(), Resumed)

    def pause(self) -> Paused:
        """Park it, serving its exits meanwhile."""
        return self.request(Pause(), Paused)

    def submit(self, message: Any) -> int:
        """Send a command; its reply is kept until :meth:`collect`."""
        return self.channel.send(message)

    def has_reply(self, sequence: int) -> bool:
        """Has a submitted command been answered?"""
        return sequence in self._replies

    def collect(self, sequence: int, *, serve_exits: bool = True) -> Any:
        """Wait for the reply to a submitted command."""
        self.wait(lambda: sequence in self._replies, serve_exits=serve_exits)
        return self._replies.pop(sequence)

    def request(self, message: Any, expected: type[Reply]) -> Reply:
        """Send a command and wait for a reply of the expected kind, serving exits meanwhile."""
        reply = self.collect(self.submit(message))
        assert isinstance(reply, expected), reply
        return reply

    def refused(self, message: Any) -> Failed:
        """Send a command that must be refused."""
        return self.request(message, Failed)

    # ------------------------------------------------------------ loop

    def wait(self, condition: Callable[[], bool], *, serve_exits: bool = True) -> None:
        """Serve until the condition holds; a worker that hangs or dies fails the test."""
        deadline = time.monotonic() + PATIENCE_S
        poll = select.poll()
        poll.register(self.channel.fileno(), select.POLLIN)
        if serve_exits:
            poll.register(self.doorbell, select.POLLIN)
        while True:
            self._receive()
            if serve_exits:
                self.serve()
                self._receive()
            if condition():
                return
            assert time.monotonic() < deadline, f"no answer within {PATIENCE_S} s; events {self.events}"
            assert not self.has_ended(), f"the worker ended with status {self.status}; events {self.events}"
            poll.poll(200)

    def _receive(self) -> None:
        while True:
            try:
                envelope = self.channel.receive()
            except ChannelError:
                return
            if envelope is None:
                return
            if isinstance(envelope.message, Hello):
                self.hello = envelope.message
            elif isinstance(envelope.message, VcpuExited):
                self.events.append(envelope.message)
            else:
                self._replies[envelope.reply_to] = envelope.message

    def serve(self, limit: int = 1 << 30) -> int:
        """Execute entries of the ring until there is none (or ``limit``); return how many."""
        try:
            os.eventfd_read(self.doorbell)
        except BlockingIOError:
            pass
        executed = 0
        self.ring.awake()
        while executed < limit:
            entry = self.ring.take()
            if entry is None:
                if self.ring.sleep():
                    break
                continue
            self.ring.complete(self.device(entry, self.ring.string))
            executed += 1
        self.entries += executed
        return executed

    def counters(self) -> dict[str, int]:
        """The worker's exit counters as it published them last."""
        return dict(zip(exit_ring.COUNTER_NAMES, self.ring.counters, strict=False))

    # ------------------------------------------------------------ end

    def has_ended(self) -> bool:
        """True when the process is gone (then its status is known)."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait_ended(self) -> int:
        """Wait for the process to end; return its exit code (negative: signal)."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.has_ended():
            assert time.monotonic() < deadline, "the worker does not end"
            time.sleep(0.001)
        assert self.status is not None
        return self.status

    def finish(self) -> int:
        """Ask it to end; return its exit code."""
        self.request(Finish(), Finished)
        return self.wait_ended()

    def close_descriptor_channel(self) -> None:
        """What a controller that died looks like."""
        self._upper.close()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait_ended()
        self.channel.close()
        self.context.destroy(linger=0)
        self._upper.close()
        if self.run_page is not None:
            self.run_page.close()
        self.parameters.release()
        self.ring.close()
        self.page.close()
        for mapping in (self.memory, self._ring_map, self._page_map):
            mapping.close()
        shared = (self.memory_fd, self._ring_fd, self._page_fd, self.doorbell, self.completion)
        for descriptor in (*shared, *self.interrupts.values()):
            os.close(descriptor)


def _plan(directory: str) -> LaunchPlan:
    values: dict[str, Any] = dict.fromkeys(LaunchPlan._fields, 0)
    values |= {
        "microvm_id": "test",
        "epoch": 7,
        "placement": "split",
        "arguments": (),
        "switched_off": (),
        "faults": (),
        "drills": (),
        "controller_ipc_directory": directory,
        "worker_ipc_directory": directory,
    }
    return LaunchPlan(**values)
