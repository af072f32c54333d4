"""Hostile guests and hostile workers against the whole set of devices: nothing raises, grows, or is published wrong."""

from __future__ import annotations

import mmap
import random
import struct
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.deferral import Deferral
from ipc.device_pages import slots_of
from ipc.exit_ring import (
    ENTRY_COUNT,
    ENTRY_SIZE,
    KIND_MMIO_READ,
    KIND_MMIO_WRITE,
    KIND_PIO_READ,
    KIND_PIO_STRING_READ,
    KIND_PIO_STRING_WRITE,
    KIND_PIO_WRITE,
    RING_SIZE,
    WORD_ASLEEP,
    WORD_DONE,
    WORD_POSTED,
    WORD_WAITING,
)
from ipc.shared_memory import PAGE_SIZE, map_shared
from vmm.cells.exits import BATCH, ExitExecutor
from vmm.devices.bus import ALL_ONES
from vmm.devices.legacy.exerciser import EXERCISER_MMIO, EXERCISER_PORT
from vmm.devices.manager import DeviceManager
from vmm.errors import DeviceError
from vmm.layout import (
    BOOT_TIMER_ADDRESS,
    COM1_PORT,
    ELCR_PORT,
    I8042_DATA_PORT,
    IOAPIC_ADDRESS,
    PIC_MASTER_PORT,
    PIC_SLAVE_PORT,
    PIT_PORT,
)

LEGACY_BASES = (PIC_MASTER_PORT, PIC_SLAVE_PORT, ELCR_PORT, PIT_PORT)
PORT_BASES = (I8042_DATA_PORT, COM1_PORT, EXERCISER_PORT, *LEGACY_BASES, 0, 0xFFF8)
MMIO_BASES = (IOAPIC_ADDRESS, BOOT_TIMER_ADDRESS, EXERCISER_MMIO, EXERCISER_MMIO + 0x1000, 0, (1 << 64) - 8)


class Machine:
    """All devices as the builder attaches them; interrupt routes come into force at once or never."""

    def __init__(self) -> None:
        self.answer_routes = True
        self.transmitted = 0
        self.devices = DeviceManager(
            transmit=self._transmit, reset=lambda: None, set_routes=self._set_routes, log=self._log
        )
        self.devices.attach_boot_timer(0, 0)
        self.devices.attach_exerciser(lambda code: None)
        self._page = mmap.mmap(self.devices.page_descriptor, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        self.slots = slots_of(self._page)

    def _transmit(self, byte: int) -> None:
        assert 0 <= byte <= 0xFF
        self.transmitted += 1

    def _set_routes(self, routes) -> Deferral:
        for route in routes:
            assert 0 <= route.data <= 0xFFFF_FFFF
            assert route.address >> 20 == 0xFEE
        deferral = Deferral()
        if self.answer_routes:
            deferral.complete()
        return deferral

    def _log(self, text: str) -> None:
        assert len(text) < 1000

    def check_page(self) -> None:
        """What workers answer by themselves is what the device would answer."""
        for window in self.devices.ports.windows():
            for offset in range(window.length):
                word = self.slots[window.slot + offset]
                if word >> 32 & 1:
                    for size in (1, 2, 4):
                        expected = self.devices.ports.read(window.address + offset, size)
                        assert word & ALL_ONES[size] == expected, f"port {window.address + offset:#x}"

    def close(self) -> None:
        self.slots.release()
        self._page.close()
        self.devices.close()


_PORTS = st.tuples(
    st.sampled_from(["in", "out"]),
    st.sampled_from(PORT_BASES),
    st.integers(0, 15),
    st.sampled_from([1, 2, 4]),
    st.integers(0, (1 << 32) - 1) | st.integers(0, 255),
)
_MMIO = st.tuples(
    st.sampled_from(["read", "write"]),
    st.sampled_from(MMIO_BASES),
    st.integers(0, 0x20) | st.integers(0, 0xFFF),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1) | st.integers(0, 0x3F),
)
_HOST = st.tuples(st.sampled_from(["type", "keys"]), st.just(0), st.just(0), st.integers(1, 200), st.just(0))


def access(machine: Machine, what: tuple[str, int, int, int, int]) -> None:
    kind, base, offset, size, value = what
    devices = machine.devices
    if kind == "in":
        assert 0 <= devices.ports.read((base + offset) & 0xFFFF, size) <= ALL_ONES[size]
    elif kind == "out":
        devices.ports.write((base + offset) & 0xFFFF, size, value & ALL_ONES[size])
    elif kind == "read":
        assert 0 <= devices.mmio.read(base + offset, size) <= ALL_ONES[size]
    elif kind == "write":
        devices.mmio.write(base + offset, size, value & ALL_ONES[size])
    elif kind == "type":
        devices.serial.receive(bytes(size))
    else:
        with suppress(DeviceError):
            devices.i8042.send_ctrl_alt_del()


@pytest.mark.soak("devices")
def test_any_accesses_in_any_order(scale):
    @settings(max_examples=scale(300, 20_000))
    @given(accesses=st.lists(_PORTS | _MMIO | _HOST, max_size=60), answer_routes=st.booleans())
    def run(accesses, answer_routes):
        machine = Machine()
        machine.answer_routes = answer_routes
        for each in accesses:
            access(machine, each)
            machine.check_page()
        machine.close()

    run()


def test_a_guest_that_goes_on_for_ever_makes_nothing_grow(seed):
    machine = Machine()
    source = random.Random(seed)

    def round_of_accesses() -> None:
        for _ in range(20_000):
            kind = source.choice(("in", "out", "read", "write", "type", "keys"))
            base = source.choice(PORT_BASES if kind in ("in", "out") else MMIO_BASES)
            access(machine, (kind, base, source.randrange(16), source.choice((1, 2, 4)), source.randrange(1 << 32)))

    round_of_accesses()
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    round_of_accesses()
    growth = sum(each.size_diff for each in tracemalloc.take_snapshot().compare_to(before, "filename"))
    tracemalloc.stop()
    assert growth < 64 << 10
    machine.close()


# ---------------------------------------------------------------- hostile rings

_WORDS = st.sampled_from([WORD_POSTED, WORD_DONE, WORD_ASLEEP, WORD_WAITING])
_ENTRIES = st.tuples(
    st.integers(0, 8) | st.sampled_from([KIND_PIO_READ, KIND_PIO_WRITE, KIND_MMIO_READ, KIND_MMIO_WRITE]),
    st.sampled_from([*PORT_BASES, *MMIO_BASES]),
    st.integers(0, 16),
    st.sampled_from([0, 1, 2, 3, 4, 8, 255]),
    st.integers(0, 3),
    st.integers(0, (1 << 64) - 1) | st.integers(0, 255),
    st.just(1) | st.sampled_from([0, 1, 2, 4096, 4097, (1 << 32) - 1]),
)
_STEPS = st.one_of(
    st.tuples(st.just("entry"), _ENTRIES),
    st.tuples(st.just("word"), st.tuples(_WORDS, st.integers(0, (1 << 64) - 1) | st.integers(0, ENTRY_COUNT + 2))),
    st.tuples(st.just("bytes"), st.tuples(st.integers(0, RING_SIZE - 64), st.binary(min_size=1, max_size=64))),
    st.tuples(st.just("drain"), st.just(())),
)


def scribble(machine: Machine, steps) -> None:
    failures: list[str] = []
    executor = ExitExecutor(
        machine.devices.ports, machine.devices.mmio, after_batch=lambda: None, failed=failures.append
    )
    buffer = map_shared(executor.descriptor, RING_SIZE)
    view = memoryview(buffer)
    words = view[:PAGE_SIZE].cast("Q")
    sequence = 0
    for kind, arguments in steps:
        if kind == "entry":
            entry_kind, base, offset, size, flags, data, count = arguments
            sequence += 1
            start = PAGE_SIZE + (sequence & (ENTRY_COUNT - 1)) * ENTRY_SIZE
            address = base + offset & (1 << 64) - 1
            fields = (sequence, 0, address, data, entry_kind, size, flags, count)
            view[start : start + ENTRY_SIZE] = struct.pack("<QQQQBBBxI24x", *fields)
            words[WORD_POSTED] = sequence
        elif kind == "word":
            words[arguments[0]] = arguments[1]
        elif kind == "bytes":
            view[arguments[0] : arguments[0] + len(arguments[1])] = arguments[1]
        else:
            executor.drain()
            assert len(failures) <= 1
    for _ in range(ENTRY_COUNT * 4096 // BATCH + 2):
        executor.drain()
    assert len(failures) <= 1
    words.release()
    view.release()
    buffer.close()
    executor.close()


@pytest.mark.soak("devices")
def test_a_scribbled_ring_breaks_itself_only(scale):
    @settings(max_examples=scale(300, 20_000))
    @given(steps=st.lists(_STEPS, max_size=40))
    def run(steps):
        machine = Machine()
        scribble(machine, steps)
        machine.check_page()
        machine.close()

    run()


@pytest.mark.parametrize("kind", [KIND_PIO_STRING_READ, KIND_PIO_STRING_WRITE])
def test_strings_to_every_port(kind):
    machine = Machine()
    steps = [
        ("entry", (kind, base, offset, size, 1, 0, 4096 // size))
        for base in PORT_BASES
        for offset in range(8)
        for size in (1, 2, 4)
    ]
    scribble(machine, steps)
    machine.check_page()
    machine.close()
