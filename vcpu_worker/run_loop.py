"""The run loop of one vCPU: KVM_RUN, and an answer to every exit.

This is the hot path. An exit is answered here from the device page, or posted to the exit ring, or sent through it
and waited for; nothing is allocated on purpose, logged or looked up twice on the way. Measured (bench/exits_inner.py):
``ioctl(fd, KVM_RUN)`` without a third argument is 0.5 µs cheaper than with one, since CPython tries two buffer
conversions before it accepts an integer.
"""

from __future__ import annotations

import fcntl

from ipc import exit_ring as ring_abi
from ipc.device_pages import READ_LOCAL, WRITE_LAZY, WRITE_POSTED, WRITE_SHARED
from ipc.exit_ring import ExitRingProducer
from vcpu_worker import reporting
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.vcpu import KvmVcpu
from vcpu_worker.reporting import FinalExit
from vcpu_worker.windows import NO_DEVICE, Windows

EINTR = 4
EAGAIN = 11

#: KVM_RUN may say EAGAIN when an INIT reaches a vCPU that waits for it; never this often in one run.
_MAX_REFUSALS = 1000
_ALL_ONES = (1 << 64) - 1

_WORD_REASON = abi.RUN_EXIT_REASON // 4
_WORD_IO = abi.RUN_IO_DIRECTION // 4
_WORD_IO_COUNT = abi.RUN_IO_COUNT // 4
_LONG_IO_DATA_OFFSET = abi.RUN_IO_DATA_OFFSET // 8
_LONG_MMIO_ADDRESS = abi.RUN_MMIO_PHYS_ADDR // 8
_LONG_MMIO_DATA = abi.RUN_MMIO_DATA // 8
_WORD_MMIO_LEN = abi.RUN_MMIO_LEN // 4

# Counted privately, one increment per exit, and added up by publish_counters(): way × kind of access.
_LOCAL_IN, _LOCAL_READ = 0, 1
_POSTED_OUT, _POSTED_WRITE = 2, 3
_CALLED_IN, _CALLED_OUT, _CALLED_READ, _CALLED_WRITE = 4, 5, 6, 7
_NOBODY_IN, _NOBODY_OUT, _NOBODY_READ, _NOBODY_WRITE = 8, 9, 10, 11
_INTERRUPTED, _IOAPIC_EOI, _FINAL = 12, 13, 14
_COUNT = 15

#: counter of the ring ← the private counts that it is the sum of
_SUMS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (ring_abi.COUNTER_EXITS, (*range(_INTERRUPTED), _IOAPIC_EOI, _FINAL)),
    (ring_abi.COUNTER_IO_IN, (_LOCAL_IN, _CALLED_IN, _NOBODY_IN)),
    (ring_abi.COUNTER_IO_OUT, (_POSTED_OUT, _CALLED_OUT, _NOBODY_OUT)),
    (ring_abi.COUNTER_MMIO_READ, (_LOCAL_READ, _CALLED_READ, _NOBODY_READ)),
    (ring_abi.COUNTER_MMIO_WRITE, (_POSTED_WRITE, _CALLED_WRITE, _NOBODY_WRITE)),
    (ring_abi.COUNTER_LOCAL, (_LOCAL_IN, _LOCAL_READ)),
    (ring_abi.COUNTER_POSTED, (_POSTED_OUT, _POSTED_WRITE)),
    (ring_abi.COUNTER_SYNCHRONOUS, (_CALLED_IN, _CALLED_OUT, _CALLED_READ, _CALLED_WRITE)),
    (ring_abi.COUNTER_INTERRUPTED, (_INTERRUPTED,)),
    (ring_abi.COUNTER_NO_DEVICE, (_NOBODY_IN, _NOBODY_OUT, _NOBODY_READ, _NOBODY_WRITE)),
    (ring_abi.COUNTER_IOAPIC_EOI, (_IOAPIC_EOI,)),
)

#: Sizes of the pieces that an MMIO access of such a length is carried out in (KVM cuts accesses at page boundaries).
_PIECES: dict[int, tuple[int, ...]] = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


class RunLoop:
    """Runs one vCPU until it is asked to stop or leaves for good.

    Without ``posts`` (other vCPUs have rings of their own) only writes that are marked as shared are posted.

    ``slots`` is the device page (64-bit words), ``windows`` are those of the worker. ``run`` is for the vCPU's thread;
    ``ask_to_stop``, ``allow_to_run``, ``raise_external_interrupt`` and ``publish_counters`` are for any thread.
    """

    def __init__(
        self,
        vcpu: KvmVcpu,
        ring: ExitRingProducer,
        slots: memoryview,
        windows: Windows,
        *,
        posts: bool = True,
        start_held: bool = False,
    ) -> None:
        self._vcpu = vcpu
        self._ring = ring
        self._slots = slots
        self._port_slots = windows.port_slots
        self._byte_inputs = windows.byte_inputs
        self._mmio_slots = windows.mmio_slots
        self._find_mmio = windows.find_mmio
        self._counts = [0] * _COUNT
        #: What the workers before have counted.
        self._counted_before = [0] * ring_abi.COUNTER_COUNT
        self._stop = False
        #: INTR of the 8259s may be high: the vector is to be asked for.
        self._external_interrupt = False
        self._refused = 0
        self._posted = WRITE_POSTED if posts else WRITE_SHARED
        #: ``run`` returns STARTING when the first INIT comes, as long as this is set.
        self.start_held = start_held

    # ------------------------------------------------------------ control, from any thread

    def ask_to_stop(self) -> None:
        """Make ``run`` return as soon as the open exit is answered; KVM_RUN must be kicked beside."""
        self._stop = True
        self._vcpu.run8[abi.RUN_IMMEDIATE_EXIT] = 1

    def allow_to_run(self) -> None:
        """Take ``ask_to_stop`` back; only while ``run`` is not executing."""
        self._vcpu.run8[abi.RUN_IMMEDIATE_EXIT] = 0
        self._stop = False

    def raise_external_interrupt(self) -> None:
        """INTR of the 8259s has risen; KVM_RUN must be kicked beside, if it is executing."""
        self._external_interrupt = True
        self._vcpu.run8[abi.RUN_IMMEDIATE_EXIT] = 1

    def publish_counters(self) -> None:
        """Write the exit counters to the ring's header, for the controller."""
        counts = self._counts
        before = self._counted_before
        shared = self._ring.counters
        for counter, parts in _SUMS:
            shared[counter] = before[counter] + sum([counts[part] for part in parts]) & _ALL_ONES

    def go_on(self, *, start_held: bool) -> None:
        """Go on for another worker, which has parked this vCPU for good; before the first ``run``."""
        self._ring.attach()
        self._counted_before = list(self._ring.counters)
        self.start_held = start_held

    def exits(self) -> int:
        """How many exits were answered so far (interrupted KVM_RUNs do not count)."""
        return sum(self._counts) - self._counts[_INTERRUPTED]

    # ------------------------------------------------------------ the vCPU's thread

    def run_held(self) -> FinalExit | None:
        """As ``run``, of a vCPU that has not started yet. One whose state was read after its INIT came is not told of
        that by KVM_RUN any more.
        """
        if self._vcpu.get_mp_state() != abi.MP_STATE_UNINITIALIZED:  # INIT has come, perhaps even the SIPI
            return reporting.STARTING
        return self.run()

    def run(self) -> FinalExit | None:
        """Run the vCPU. None: it was asked to stop, no exit is open. Otherwise why it cannot go on."""
        vcpu = self._vcpu
        run8 = vcpu.run8
        run32 = vcpu.run32
        run64 = vcpu.run64
        slots = self._slots
        byte_input = self._byte_inputs.get
        mmio_slot = self._mmio_slots.get
        counts = self._counts
        ioctl = fcntl.ioctl
        descriptor = vcpu.descriptor
        kvm_run = abi.KVM_RUN
        exit_io = abi.EXIT_IO
        exit_mmio = abi.EXIT_MMIO
        self._refused = 0
        if self._external_interrupt:
            run8[abi.RUN_IMMEDIATE_EXIT] = 1  # it may have risen while the vCPU was parked
        while True:
            try:
                ioctl(descriptor, kvm_run)
            except OSError as error:
                counts[_INTERRUPTED] += 1
                if self._stop:
                    self.publish_counters()
                    return None
                if (final := self._not_run(error.errno or 0)) is not None:
                    return final
                continue
            reason = run32[_WORD_REASON]
            if reason == exit_io:
                access = run32[_WORD_IO]
                slot = byte_input(access)
                if slot is not None and run32[_WORD_IO_COUNT] == 1:
                    word = slots[slot]
                    if word & READ_LOCAL:
                        run8[run64[_LONG_IO_DATA_OFFSET]] = word & 0xFF
                        counts[_LOCAL_IN] += 1
                        continue
                self._port_access(access & 0xFF, access >> 8 & 0xFF, access >> 16)
            elif reason == exit_mmio:
                slot = mmio_slot(run64[_LONG_MMIO_ADDRESS])
                if slot is not None and slot >= 0 and not run8[abi.RUN_MMIO_IS_WRITE]:
                    word = slots[slot]
                    if word & READ_LOCAL:
                        run64[_LONG_MMIO_DATA] = word & 0xFFFF_FFFF
                        counts[_LOCAL_READ] += 1
                        continue
                self._mmio_access()
            elif (final := self._other_exit(reason)) is not None:
                return final

    def _other_exit(self, reason: int) -> FinalExit | None:
        """Neither port I/O nor MMIO. None: go on."""
        if reason == abi.EXIT_IRQ_WINDOW_OPEN:
            self._take_external_interrupt()
        elif reason == abi.EXIT_IOAPIC_EOI:
            self._counts[_IOAPIC_EOI] += 1
        elif reason != abi.EXIT_INTR:
            return self._finish(reporting.describe(self._vcpu))
        return None

    def _not_run(self, errno: int) -> FinalExit | None:
        """KVM_RUN failed, not because we are to stop. None: go on."""
        if errno == EINTR:
            if self._vcpu.run8[abi.RUN_IMMEDIATE_EXIT]:
                self._interrupted()
            return None
        if errno == EAGAIN and self.start_held:
            return reporting.STARTING
        self._refused += 1
        if errno != EAGAIN or self._refused > _MAX_REFUSALS:
            return self._finish(reporting.describe_failure(errno))
        return None

    def _finish(self, final: FinalExit) -> FinalExit:
        self._counts[_FINAL] += 1
        self.publish_counters()
        return final

    # ------------------------------------------------------------ the 8259s

    def _interrupted(self) -> None:
        """KVM_RUN was made to return; not to stop, or that came this very moment."""
        run8 = self._vcpu.run8
        run8[abi.RUN_IMMEDIATE_EXIT] = 0
        if self._stop:
            run8[abi.RUN_IMMEDIATE_EXIT] = 1
        elif self._external_interrupt:
            if run8[abi.RUN_READY_FOR_INTERRUPT_INJECTION]:
                self._take_external_interrupt()
            else:
                run8[abi.RUN_REQUEST_INTERRUPT_WINDOW] = 1

    def _take_external_interrupt(self) -> None:
        """The vCPU can take an interrupt now, and no exit is open: carry out the INTA cycle."""
        run8 = self._vcpu.run8
        run8[abi.RUN_REQUEST_INTERRUPT_WINDOW] = 0
        if self._stop or not self._external_interrupt:
            return  # to be parked: what runs on asks again
        # Before the call: what rises afterwards is in the answer, or is told anew.
        self._external_interrupt = False
        answer = self._ring.call(ring_abi.KIND_ACKNOWLEDGE, 0, 1, 0)
        if answer & ring_abi.ACKNOWLEDGED:
            self._vcpu.inject_interrupt(answer & 0xFF)
        self._ring.applied()
        if answer & ring_abi.ACKNOWLEDGED_MORE:
            self._external_interrupt = True
            run8[abi.RUN_REQUEST_INTERRUPT_WINDOW] = 1

    # ------------------------------------------------------------ ports

    def _port_access(self, direction: int, size: int, port: int) -> None:
        vcpu = self._vcpu
        offset = vcpu.run64[_LONG_IO_DATA_OFFSET]
        slot = self._port_slots.get(port)
        if vcpu.run32[_WORD_IO_COUNT] != 1:
            self._port_string(direction, size, port, offset, slot)
        elif direction == abi.EXIT_IO_OUT:
            self._port_output(size, port, offset, slot)
        else:
            self._port_input(size, port, offset, slot)

    def _port_output(self, size: int, port: int, offset: int, slot: int | None) -> None:
        if slot is None:
            self._counts[_NOBODY_OUT] += 1
            return
        vcpu = self._vcpu
        if size == 1:
            value = vcpu.run8[offset]
        elif size == 2:
            value = vcpu.run16[offset >> 1]
        else:
            value = vcpu.run32[offset >> 2]
        word = self._slots[slot]
        if word & self._posted:
            self._ring.post(ring_abi.KIND_PIO_WRITE, port, size, value, word & WRITE_LAZY)
            self._counts[_POSTED_OUT] += 1
            return
        self._ring.call(ring_abi.KIND_PIO_WRITE, port, size, value)
        self._ring.applied()
        self._counts[_CALLED_OUT] += 1

    def _port_input(self, size: int, port: int, offset: int, slot: int | None) -> None:
        called = False
        if slot is None:
            value = 0
            self._counts[_NOBODY_IN] += 1
        else:
            value = self._slots[slot]
            if value & READ_LOCAL:
                self._counts[_LOCAL_IN] += 1
            else:
                value = self._ring.call(ring_abi.KIND_PIO_READ, port, size, 0)
                called = True
        vcpu = self._vcpu
        if size == 1:
            vcpu.run8[offset] = value & 0xFF
        elif size == 2:
            vcpu.run16[offset >> 1] = value & 0xFFFF
        else:
            vcpu.run32[offset >> 2] = value & 0xFFFF_FFFF
        if called:
            self._ring.applied()
            self._counts[_CALLED_IN] += 1

    def _port_string(self, direction: int, size: int, port: int, offset: int, slot: int | None) -> None:
        """REP INS and REP OUTS: KVM hands over at most a page of them at once. Always synchronous."""
        ring = self._ring
        count = self._vcpu.run32[_WORD_IO_COUNT]
        length = size * count
        data = self._vcpu.run8[offset : offset + length]
        if direction == abi.EXIT_IO_OUT:
            if slot is None:
                self._counts[_NOBODY_OUT] += 1
                return
            ring.string[:length] = data
            ring.call(ring_abi.KIND_PIO_STRING_WRITE, port, size, 0, count)
            self._counts[_CALLED_OUT] += 1
        else:
            if slot is None:
                data[:] = bytes(length)
                self._counts[_NOBODY_IN] += 1
                return
            ring.call(ring_abi.KIND_PIO_STRING_READ, port, size, 0, count)
            data[:] = ring.string[:length]
            self._counts[_CALLED_IN] += 1
        ring.applied()

    # ------------------------------------------------------------ MMIO

    def _mmio_access(self) -> None:
        vcpu = self._vcpu
        address = vcpu.run64[_LONG_MMIO_ADDRESS]
        length = vcpu.run32[_WORD_MMIO_LEN]
        slot = self._find_mmio(address)
        if vcpu.run8[abi.RUN_MMIO_IS_WRITE]:
            self._mmio_write(address, length, slot)
        else:
            self._mmio_read(address, length, slot)

    def _mmio_write(self, address: int, length: int, slot: int) -> None:
        if slot == NO_DEVICE:
            self._counts[_NOBODY_WRITE] += 1
            return
        value = self._vcpu.run64[_LONG_MMIO_DATA] & (1 << 8 * length) - 1
        word = self._slots[slot]
        posted = word & self._posted
        for size in _PIECES.get(length, (length,)):
            part = value & (1 << 8 * size) - 1
            if posted:
                self._ring.post(ring_abi.KIND_MMIO_WRITE, address, size, part, word & WRITE_LAZY)
            else:
                self._ring.call(ring_abi.KIND_MMIO_WRITE, address, size, part)
                self._ring.applied()
            address += size
            value >>= 8 * size
        self._counts[_POSTED_WRITE if posted else _CALLED_WRITE] += 1

    def _mmio_read(self, address: int, length: int, slot: int) -> None:
        vcpu = self._vcpu
        if slot == NO_DEVICE:
            vcpu.run64[_LONG_MMIO_DATA] = 0  # what lies there is left from another access
            self._counts[_NOBODY_READ] += 1
            return
        word = self._slots[slot]
        if word & READ_LOCAL:
            vcpu.run64[_LONG_MMIO_DATA] = word & 0xFFFF_FFFF
            self._counts[_LOCAL_READ] += 1
            return
        value = 0
        done = 0
        for size in _PIECES.get(length, (length,)):
            answer = self._ring.call(ring_abi.KIND_MMIO_READ, address + done, size, 0)
            value |= (answer & (1 << 8 * size) - 1) << 8 * done
            done += size
        vcpu.run64[_LONG_MMIO_DATA] = value
        self._ring.applied()
        self._counts[_CALLED_READ] += 1
