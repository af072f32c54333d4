"""Executes what vCPUs put into their exit rings, strictly in order and exactly once."""

from __future__ import annotations

import mmap
import os
import select
import time

from base.event_manager import EventOps, Events, Timer
from base.lean_typing import TYPE_CHECKING, Callable
from ipc.errors import RingError
from ipc.exit_ring import (
    COUNTER_IO_IN,
    COUNTER_IO_OUT,
    COUNTER_MMIO_READ,
    COUNTER_MMIO_WRITE,
    ENTRY_COUNT,
    KIND_ACKNOWLEDGE,
    KIND_MMIO_READ,
    KIND_MMIO_WRITE,
    KIND_PIO_READ,
    KIND_PIO_STRING_READ,
    KIND_PIO_WRITE,
    NEVER,
    RING_SIZE,
    Entry,
    ExitRingConsumer,
    initialise,
)
from ipc.shared_memory import create_shared, map_shared
from vmm.devices.bus import Bus

if TYPE_CHECKING:
    from base.lean_typing import Sequence
    from vmm.observe.metrics import Metrics

#: Device accesses executed before other events get their turn.
BATCH = 1024
#: How long lazy entries may wait.
NAP_NS = 1_000_000
#: Where the doorbell's count goes, which says nothing.
_COUNT = (bytearray(8),)
_MMIO_KINDS = frozenset((KIND_MMIO_READ, KIND_MMIO_WRITE))

_EXITS = (
    ("exit_io_in", COUNTER_IO_IN),
    ("exit_io_out", COUNTER_IO_OUT),
    ("exit_mmio_read", COUNTER_MMIO_READ),
    ("exit_mmio_write", COUNTER_MMIO_WRITE),
)


class ExitExecutor:
    """One vCPU's ring: its shared memory, its two eventfds, and the loop that executes entries.

    ``before_batch`` and ``after_batch`` run once around each batch (interrupts are held, the console writes).
    ``failed`` is called with a text when the worker breaks the rules of the ring; nothing is executed afterwards.

    After a batch the executor naps: it looks again a millisecond later, and the worker need not wake it for lazy
    entries, which come in bursts (console output). After a nap in which nothing came it sleeps.

    ``rings`` are the executors of all vCPUs of the microVM; this one adds itself. A guest's locks put accesses of
    different vCPUs in order, of which posted ones may still be in another ring: before a port is accessed, what other
    rings hold of before is executed.

    ``acknowledge`` answers INTA cycles, which only vCPU 0 has (vmm.devices.legacy.external_interrupt).
    """

    def __init__(
        self,
        ports: Bus,
        mmio: Bus,
        *,
        after_batch: Callable[[], None],
        failed: Callable[[str], None],
        before_batch: Callable[[], None] = lambda: None,
        rings: list[ExitExecutor] | None = None,
        acknowledge: Callable[[], int] = lambda: 0,
    ) -> None:
        self._ports = ports
        self._mmio = mmio
        self._before_batch = before_batch
        self._after_batch = after_batch
        self._failed = failed
        self._acknowledge = acknowledge
        self._rings = [] if rings is None else rings
        self._rings.append(self)
        self._ops: EventOps | None = None
        self._nap: Timer | None = None
        #: A call is under way that goes on where a batch has ended.
        self._going_on = False
        self._parked = False
        self._broken = False
        self.descriptor = create_shared("exit-ring", RING_SIZE)
        self._buffer: mmap.mmap = map_shared(self.descriptor, RING_SIZE)
        initialise(self._buffer)
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.completion = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ring = ExitRingConsumer(self._buffer, self.completion)

    @property
    def idle(self) -> bool:
        """True when no entry waits or is being executed."""
        return self._ring.idle

    def counters(self) -> tuple[int, ...]:
        """Return the worker's exit counters, in the order of ipc.exit_ring.COUNTER_NAMES."""
        return tuple(self._ring.counters)

    def ghost_counters(self, vcpu: int) -> tuple[int, ...]:
        """Return what the worker has counted of its ghost of another vCPU (ipc.exit_ring.GHOST_STUB and so on)."""
        return self._ring.ghost_counters(vcpu)

    def init(self, ops: EventOps) -> None:
        """Subscriber: watch the doorbell."""
        self._ops = ops
        ops.watch(self.doorbell, select.EPOLLIN, self._rang)

    def process(self, events: Events, ops: EventOps) -> None:
        """Subscriber: nothing is watched this way."""

    def _rang(self, event_set: int) -> None:
        try:
            # RWF_NOWAIT: never blocks, even if the worker took O_NONBLOCK from the open file and emptied it meanwhile.
            # An eventfd knows it from Linux 5.8 on. -1: at no offset.
            os.preadv(self.doorbell, _COUNT, -1, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        self.drain()

    def drain(self) -> None:
        """Execute entries until the ring is empty, an entry is deferred, or a batch is full."""
        if self._parked or self._broken:
            return
        self._before_batch()
        try:
            self._ring.awake()
            self._drain()
        except RingError as error:
            self._broken = True
            self._failed(str(error))
        self._after_batch()

    def _drain(self) -> None:
        ring = self._ring
        budget = BATCH
        linger = False
        while budget > 0:
            entry = ring.take()
            if entry is None:
                if linger and ring.linger():
                    linger = False  # an entry is there
                elif self._nap_or_sleep(budget < BATCH):
                    return
                budget -= 1
                continue
            budget -= entry.count
            linger = entry.flags != 0  # after a synchronous exit the next one is often close
            if len(self._rings) > 1 and entry.kind not in _MMIO_KINDS:
                budget -= self._older_first(entry.time)
            if not self._execute(entry):
                return
        self._go_on_soon()  # after the other subscribers

    def _execute(self, entry: Entry) -> bool:
        """Execute the entry that was taken; False if it was deferred."""
        kind = entry.kind
        if kind == KIND_PIO_WRITE:
            deferral = self._ports.write(entry.address, entry.size, entry.data)
        elif kind == KIND_MMIO_WRITE:
            deferral = self._mmio.write(entry.address, entry.size, entry.data)
        else:
            self._ring.complete(self._answer(entry))
            return True
        if deferral is None:
            self._ring.complete()
            return True
        self._parked = True
        deferral.then(self._unpark)
        return False

    def _older_first(self, time: int) -> int:
        """Execute what other rings hold of before ``time``, the oldest first; returns how many entries.

        What comes before an entry in the guest was posted before the entry was, so whoever sees the entry sees it.
        """
        for number in range(ENTRY_COUNT):
            oldest = self._oldest(time)
            if oldest is None:
                return number
            for _ in range(ENTRY_COUNT):  # it may have been posted since we looked into another ring
                older = self._oldest(oldest.next_time())
                if older is None:
                    break
                oldest = older
            oldest.execute_next()
        return ENTRY_COUNT

    def _oldest(self, time: int) -> ExitExecutor | None:
        found = None
        for each in self._rings:
            if each is not self and (stamp := each.next_time()) < time:
                found, time = each, stamp
        return found

    def next_time(self) -> int:
        """Return the time stamp of the entry that is due; NEVER if there is none, or while one is deferred."""
        return NEVER if self._broken else self._ring.next_time()

    def execute_next(self) -> None:
        """Execute one entry, on behalf of another vCPU's executor."""
        try:
            entry = self._ring.take()
            if entry is not None:
                self._execute(entry)
        except RingError as error:
            self._broken = True
            self._failed(str(error))

    def _nap_or_sleep(self, busy: bool) -> bool:
        """Nothing is left: nap if something was, else sleep. False if an entry came in meanwhile."""
        if not busy or self._ops is None:
            return self._ring.sleep()
        if not self._ring.nap():
            return False
        if self._nap is None:
            self._nap = self._ops.add_timer(time.monotonic_ns() + NAP_NS, self._nap_over)
        return True

    def _nap_over(self) -> None:
        self._nap = None
        self.drain()

    def _go_on_soon(self) -> None:
        if self._ops is not None and not self._going_on:
            self._going_on = True
            self._ops.soon(self._go_on)

    def _go_on(self) -> None:
        self._going_on = False
        self.drain()

    def _unpark(self) -> None:
        self._parked = False
        self._ring.complete()
        self.drain()

    def _answer(self, entry: Entry) -> int:
        kind = entry.kind
        if kind == KIND_PIO_READ:
            return self._ports.read(entry.address, entry.size)
        if kind == KIND_MMIO_READ:
            return self._mmio.read(entry.address, entry.size)
        if kind == KIND_ACKNOWLEDGE:
            return self._acknowledge()
        self._string(entry)
        return 0

    def _string(self, entry: Entry) -> None:
        """Repeated port I/O: ``count`` elements in the string area. No port device defers a write."""
        size, address = entry.size, entry.address
        length = entry.count * size
        if entry.kind == KIND_PIO_STRING_READ:
            read = self._ports.read
            self._ring.string[:length] = b"".join(
                [read(address, size).to_bytes(size, "little") for _ in range(entry.count)]
            )
            return
        write = self._ports.write
        data = bytes(self._ring.string[:length])
        for start in range(0, length, size):
            write(address, size, int.from_bytes(data[start : start + size], "little"))

    def close(self) -> None:
        """Release the ring. The event loop must not know this subscriber any more."""
        self._ring.close()
        self._buffer.close()
        for descriptor in (self.descriptor, self.doorbell, self.completion):
            os.close(descriptor)


def read_exits(metrics: Metrics, counters: Sequence[Sequence[int]]) -> None:
    """Take over the exit counters of all vCPUs (in the order of ipc.exit_ring.COUNTER_NAMES)."""
    group = metrics["vcpu"]
    for key, index in _EXITS:
        group.store(key, sum([of_vcpu[index] for of_vcpu in counters]))
