"""The exit ring: every KVM exit that leaves a worker, posted or synchronous, goes through one of these.

One ring per vCPU, single producer (the thread that runs the vCPU), single consumer (the controller), in one
sealed memfd. docs/formats/exit-ring.md holds the layout and the rules; this module is the only code that knows
the offsets.

The consumer does not trust the producer (a worker that the guest has taken over): every field is bounded, and a
breach raises RingError, after which the ring must not be used any more. The producer trusts the consumer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
from time import monotonic_ns

from ipc.errors import RingError
from ipc.launch_plan import MAX_WORKERS
from ipc.shared_event import raise_event
from ipc.shared_memory import PAGE_SIZE, fence

MAGIC = 0x3130_474E_4952_4243  # "CBRING01" in little-endian byte order
LAYOUT_VERSION = 3
ENTRY_COUNT = 256
ENTRY_SIZE = 64
STRING_DATA_SIZE = PAGE_SIZE
RING_SIZE = PAGE_SIZE + ENTRY_COUNT * ENTRY_SIZE + STRING_DATA_SIZE

# Header words (64 bits each). Words that different sides write are in different cache lines.
WORD_MAGIC = 0
WORD_VERSION = 1
WORD_ENTRY_COUNT = 2
WORD_POSTED = 8  # producer: sequence number of the last entry that is complete
WORD_WAITING = 9  # producer: sequence number it waits for in the completion eventfd, 0 = it does not wait
WORD_CONSUMED = 10  # producer: last sequence number whose answer was applied to the vCPU
WORD_DONE = 16  # consumer: sequence number of the last entry that was executed
WORD_ASLEEP = 17  # consumer: when the doorbell must be rung, AWAKE, ASLEEP or NAPPING
WORD_ANSWER = 18  # consumer: value for the last synchronous read
WORD_COUNTERS = 32  # producer: statistics, COUNTER_* below
WORD_GHOSTS = 64  # producer: GHOST_WORDS words for each vCPU, if the worker has a ghost of it; in one of its rings

# Counters, relative to WORD_COUNTERS.
COUNTER_EXITS = 0
COUNTER_IO_IN = 1
COUNTER_IO_OUT = 2
COUNTER_MMIO_READ = 3
COUNTER_MMIO_WRITE = 4
COUNTER_LOCAL = 5
COUNTER_POSTED = 6
COUNTER_SYNCHRONOUS = 7
COUNTER_RING_FULL = 8
COUNTER_INTERRUPTED = 9
COUNTER_NO_DEVICE = 10
COUNTER_IOAPIC_EOI = 11
COUNTER_COUNT = 16
COUNTER_NAMES = (
    "exits",
    "io_in",
    "io_out",
    "mmio_read",
    "mmio_write",
    "local",
    "posted",
    "synchronous",
    "ring_full",
    "interrupted",
    "no_device",
    "ioapic_eoi",
)

# What is counted of a ghost, relative to its first word.
GHOST_STUB = 0  # 1 when it runs the stub
GHOST_EXITS = 1  # those that reached user space: the rest was forwarded in the kernel
GHOST_STARTUPS = 2
GHOST_NMIS = 3
GHOST_RECOVERIES = 4
GHOST_WORDS = 8

_ENTRIES_OFFSET = PAGE_SIZE
_STRING_OFFSET = PAGE_SIZE + ENTRY_COUNT * ENTRY_SIZE

# sequence, time, address, data, kind, size, flags, padding, count, padding to a cache line
_ENTRY = struct.Struct("<QQQQBBBxI24x")
_TIME = struct.Struct("<8xQ")
assert _ENTRY.size == ENTRY_SIZE
assert RING_SIZE == 6 * PAGE_SIZE
assert WORD_COUNTERS + COUNTER_COUNT <= WORD_GHOSTS
assert (WORD_GHOSTS + MAX_WORKERS * GHOST_WORDS) * 8 <= PAGE_SIZE
assert ENTRY_COUNT & (ENTRY_COUNT - 1) == 0

KIND_PIO_READ = 1
KIND_PIO_WRITE = 2
KIND_MMIO_READ = 3
KIND_MMIO_WRITE = 4
KIND_PIO_STRING_READ = 5  # count × size bytes in the string area, written by the consumer
KIND_PIO_STRING_WRITE = 6  # count × size bytes in the string area, written by the producer

KIND_ACKNOWLEDGE = 7  # INTA: the answer is 0, or the vector with ACKNOWLEDGED

FLAG_SYNCHRONOUS = 1

# The answer to KIND_ACKNOWLEDGE, above the vector.
ACKNOWLEDGED = 0x100
ACKNOWLEDGED_MORE = 0x200  # the line is still high: ask again

# Values of WORD_ASLEEP.
AWAKE = 0  # the consumer looks by itself
ASLEEP = 1  # ring for every entry
NAPPING = 2  # the consumer looks again soon: ring for what cannot wait, or when the ring is half full

#: How often one side looks at the other's word before it sleeps in the kernel. Both sleeping costs two wake-ups for
#: every synchronous exit (30–50 µs); looking this often takes about as long. Only where two can run at once.
SPINS = 500 if len(os.sched_getaffinity(0)) > 1 else 0
_SPIN_RANGE = range(SPINS)

#: What :meth:`ExitRingConsumer.next_time` returns if there is no entry: later than all.
NEVER = (1 << 64) - 1

_LAST_KIND = KIND_ACKNOWLEDGE
_STRING_KINDS = frozenset((KIND_PIO_STRING_READ, KIND_PIO_STRING_WRITE))
_PORT_KINDS = frozenset((KIND_PIO_READ, KIND_PIO_WRITE, KIND_ACKNOWLEDGE)) | _STRING_KINDS
_POSTABLE_KINDS = frozenset((KIND_PIO_WRITE, KIND_MMIO_WRITE))
_LAST_PORT = 0xFFFF
_PORT_SIZES = frozenset((1, 2, 4))
_MMIO_SIZES = frozenset((1, 2, 4, 8))


def initialise(buffer: mmap.mmap) -> None:
    """Write the header of a fresh (zero-filled) ring; done by the controller before the descriptor is passed on."""
    words = memoryview(buffer)[:PAGE_SIZE].cast("Q")
    words[WORD_VERSION] = LAYOUT_VERSION
    words[WORD_ENTRY_COUNT] = ENTRY_COUNT
    words[WORD_ASLEEP] = ASLEEP
    words[WORD_MAGIC] = MAGIC
    words.release()


def _check_header(buffer: mmap.mmap) -> None:
    # With views of its own: one that lives on in the traceback would keep the caller from closing the mapping.
    if len(buffer) != RING_SIZE:
        raise RingError(f"an exit ring has {RING_SIZE} bytes, not {len(buffer)}")
    with memoryview(buffer).cast("Q") as words:
        found = (words[WORD_MAGIC], words[WORD_VERSION], words[WORD_ENTRY_COUNT])
    if found != (MAGIC, LAYOUT_VERSION, ENTRY_COUNT):
        raise RingError("not an exit ring of this version")


class ExitRingProducer:
    """The worker's side. ``doorbell`` and ``completion`` are non-blocking eventfds, owned by the caller."""

    __slots__ = (
        "_completion",
        "_doorbell",
        "_entries",
        "_pack",
        "_poll",
        "_sequence",
        "_view",
        "counters",
        "string",
        "words",
    )

    def __init__(self, buffer: mmap.mmap, doorbell: int, completion: int, *, attached: bool = True) -> None:
        """Without ``attached`` nothing is written yet: another producer uses the ring until :meth:`attach`."""
        _check_header(buffer)
        self._view = memoryview(buffer)
        self.words = self._view[:PAGE_SIZE].cast("Q")
        self.counters = self._view[WORD_COUNTERS * 8 : (WORD_COUNTERS + COUNTER_COUNT) * 8].cast("Q")
        self.string = self._view[_STRING_OFFSET : _STRING_OFFSET + STRING_DATA_SIZE]
        self._entries = self._view[_ENTRIES_OFFSET:_STRING_OFFSET]
        self._pack = _ENTRY.pack_into
        self._doorbell = doorbell
        self._completion = completion
        poll = select.poll()
        poll.register(completion, select.POLLIN)
        self._poll = poll.poll
        self._sequence = 0
        if attached:
            self.attach()

    def attach(self) -> None:
        """Go on where the producer before has stopped, which will not use the ring any more."""
        self._sequence = self.words[WORD_POSTED]
        self.words[WORD_WAITING] = 0

    def ghost_counters(self, vcpu: int) -> memoryview:
        """Return the words (GHOST_*) of the worker's ghost of this vCPU; release them before :meth:`close`."""
        first = WORD_GHOSTS + vcpu * GHOST_WORDS
        return self.words[first : first + GHOST_WORDS]

    def _publish(  # noqa: PLR0917
        self, kind: int, address: int, size: int, data: int, flags: int, count: int, lazy: int
    ) -> int:
        words = self.words
        sequence = self._sequence + 1
        if sequence - words[WORD_DONE] > ENTRY_COUNT:
            self.counters[COUNTER_RING_FULL] += 1
            self._wait(sequence - ENTRY_COUNT)
        offset = (sequence & (ENTRY_COUNT - 1)) * ENTRY_SIZE
        self._pack(self._entries, offset, sequence, monotonic_ns(), address, data, kind, size, flags, count)
        words[WORD_POSTED] = sequence
        self._sequence = sequence
        fence()
        asleep = words[WORD_ASLEEP]
        if asleep and (asleep == ASLEEP or not lazy or sequence - words[WORD_DONE] >= ENTRY_COUNT // 2):
            os.eventfd_write(self._doorbell, 1)
        return sequence

    def _wait(self, sequence: int) -> None:
        """Block until the consumer has executed entry ``sequence``."""
        words = self.words
        words[WORD_WAITING] = sequence
        fence()
        while words[WORD_DONE] < sequence:
            self._sleep()
        words[WORD_WAITING] = 0

    def _sleep(self) -> None:
        """Block until the consumer writes the completion eventfd, or for no reason.

        A kick (signal) does not end it: CPython repeats poll() and read() after EINTR, but not os.eventfd_read().
        """
        self._poll()
        try:
            os.read(self._completion, 8)
        except BlockingIOError:
            pass

    def post(self, kind: int, address: int, size: int, data: int, lazy: int = 0) -> None:
        """Append a write that nobody waits for; blocks only while the ring is full.

        ``lazy`` (not 0): a napping consumer is not woken for it.
        """
        sequence = self._publish(kind, address, size, data, 0, 1, lazy)
        self.words[WORD_CONSUMED] = sequence

    def call(self, kind: int, address: int, size: int, data: int, count: int = 1) -> int:
        """Append an entry and wait until it was executed; return the answer (for reads).

        The caller applies the answer to the vCPU and then calls :meth:`applied`.
        """
        sequence = self._publish(kind, address, size, data, FLAG_SYNCHRONOUS, count, 0)
        words = self.words
        for _ in _SPIN_RANGE:
            if words[WORD_DONE] >= sequence:
                break
        else:
            self._wait(sequence)  # only now: who looks by itself need not be woken
        return words[WORD_ANSWER]

    def applied(self) -> None:
        """Note that the answer of the last synchronous entry is in the vCPU (the journal's last step)."""
        self.words[WORD_CONSUMED] = self._sequence

    def close(self) -> None:
        """Release the views; the mapping and the eventfds stay with the caller."""
        self.words.release()
        self.counters.release()
        self.string.release()
        self._entries.release()
        self._view.release()


class Entry:
    """The entry that the consumer holds between :meth:`ExitRingConsumer.take` and ``complete``; reused."""

    __slots__ = ("address", "count", "data", "flags", "kind", "sequence", "size", "time")

    def __init__(self) -> None:
        self.sequence = 0
        self.time = 0
        self.address = 0
        self.data = 0
        self.kind = 0
        self.size = 0
        self.flags = 0
        self.count = 0


class ExitRingConsumer:
    """The controller's side: takes entries strictly in order and completes each exactly once.

    ``completion`` is made non-blocking if it is not: a hostile worker can fill an eventfd, and a blocking write to
    it would stop the controller. (Nor may the worker change that: its filter refuses F_SETFL and FIONBIO.)
    """

    __slots__ = (
        "_completion",
        "_done",
        "_entries",
        "_pending",
        "_unpack",
        "_view",
        "_woken",
        "_words",
        "counters",
        "entry",
        "string",
    )

    def __init__(self, buffer: mmap.mmap, completion: int) -> None:
        _check_header(buffer)
        self._view = memoryview(buffer)
        self._words = self._view[:PAGE_SIZE].cast("Q")
        self.counters = self._view[WORD_COUNTERS * 8 : (WORD_COUNTERS + COUNTER_COUNT) * 8].cast("Q")
        self.string = self._view[_STRING_OFFSET : _STRING_OFFSET + STRING_DATA_SIZE]
        self._entries = self._view[_ENTRIES_OFFSET:_STRING_OFFSET]
        self._unpack = _ENTRY.unpack_from
        status = fcntl.fcntl(completion, fcntl.F_GETFL)
        if not status & os.O_NONBLOCK:
            fcntl.fcntl(completion, fcntl.F_SETFL, status | os.O_NONBLOCK)
        self._completion = completion
        self._done = self._words[WORD_DONE]
        self._woken = 0
        self._pending = False
        self.entry = Entry()

    @property
    def done(self) -> int:
        """Sequence number of the last executed entry."""
        return self._done

    @property
    def idle(self) -> bool:
        """True when every posted entry was executed."""
        return not self._pending and bool(self._words[WORD_POSTED] == self._done)

    def take(self) -> Entry | None:
        """Return the next entry (a reused object), or None when there is none.

        The entry is copied out of shared memory before it is checked. Raises RingError on any breach.
        """
        assert not self._pending, "complete() the entry before taking the next"
        posted = self._words[WORD_POSTED]
        if posted == self._done:
            return None
        if not 0 < posted - self._done <= ENTRY_COUNT:
            raise RingError(f"posted sequence {posted} is out of range (done {self._done})")
        expected = self._done + 1
        entry = self.entry
        (entry.sequence, entry.time, entry.address, entry.data, entry.kind, entry.size, entry.flags, entry.count) = (
            self._unpack(self._entries, (expected & (ENTRY_COUNT - 1)) * ENTRY_SIZE)
        )
        if entry.sequence != expected:
            raise RingError(f"entry {expected} carries sequence {entry.sequence}")
        self._check(entry)
        self._pending = True
        return entry

    def next_time(self) -> int:
        """Return when the next entry was written (CLOCK_MONOTONIC, ns, as the worker says), or NEVER."""
        done = self._done
        if self._pending or self._words[WORD_POSTED] == done:
            return NEVER
        (time,) = _TIME.unpack_from(self._entries, (done + 1 & (ENTRY_COUNT - 1)) * ENTRY_SIZE)
        return int(time)

    @staticmethod
    def _check(entry: Entry) -> None:
        kind, size = entry.kind, entry.size
        if kind in _PORT_KINDS:
            bounded = size in _PORT_SIZES and entry.address <= _LAST_PORT
        else:
            bounded = 0 < kind <= _LAST_KIND and size in _MMIO_SIZES
        if not bounded or entry.flags > FLAG_SYNCHRONOUS or entry.data >> 8 * size:
            raise RingError(
                f"entry {entry.sequence}: kind {kind}, size {size}, flags {entry.flags}, address {entry.address:#x}, "
                f"data {entry.data:#x}"
            )
        if not entry.flags and kind not in _POSTABLE_KINDS:
            raise RingError(f"entry {entry.sequence}: kind {kind} cannot be posted")
        if kind in _STRING_KINDS:
            if not 0 < entry.count * size <= STRING_DATA_SIZE:
                raise RingError(f"entry {entry.sequence}: string of {entry.count} × {size} bytes")
        elif entry.count != 1:
            raise RingError(f"entry {entry.sequence}: count {entry.count}")

    def complete(self, answer: int = 0) -> None:
        """Mark the taken entry as executed, with the value for a read, and wake a waiting producer.

        Raises BlockedEventError (ipc.shared_event).
        """
        assert self._pending, "no entry was taken"
        words = self._words
        done = self._done + 1
        if self.entry.flags:
            words[WORD_ANSWER] = answer
        words[WORD_DONE] = done
        self._done = done
        self._pending = False
        fence()
        waiting = words[WORD_WAITING]
        # Once for each number: behind a full ring the producer's word stays until it gets to run.
        if waiting and waiting <= done and waiting != self._woken:
            self._woken = waiting
            raise_event(self._completion)

    def awake(self) -> None:
        """Say that the consumer looks at the ring by itself; no doorbell is needed until :meth:`sleep`."""
        self._words[WORD_ASLEEP] = AWAKE

    def sleep(self) -> bool:
        """Ask for the doorbell; False means that an entry came in meanwhile and must be taken first."""
        return self._lie_down(ASLEEP)

    def nap(self) -> bool:
        """As :meth:`sleep`, but lazy entries do not ring: the caller must look again soon by itself."""
        return self._lie_down(NAPPING)

    def _lie_down(self, how: int) -> bool:
        words = self._words
        words[WORD_ASLEEP] = how
        fence()
        if words[WORD_POSTED] != self._done:
            words[WORD_ASLEEP] = AWAKE
            return False
        return True

    def ghost_counters(self, vcpu: int) -> tuple[int, ...]:
        """Return what the worker has counted of its ghost of this vCPU (GHOST_*); any numbers, if it lies."""
        first = WORD_GHOSTS + vcpu * GHOST_WORDS
        return tuple(self._words[first : first + GHOST_WORDS])

    def linger(self) -> bool:
        """Look for a next entry for some microseconds; True if there is one."""
        words, done = self._words, self._done
        for _ in _SPIN_RANGE:  # noqa: SIM110 (a generator would cost more than the look)
            if words[WORD_POSTED] != done:
                return True
        return False

    def close(self) -> None:
        """Release the views; the mapping and the eventfd stay with the caller."""
        self._words.release()
        self.counters.release()
        self.string.release()
        self._entries.release()
        self._view.release()
