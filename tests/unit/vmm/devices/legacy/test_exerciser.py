"""The exerciser."""

from __future__ import annotations

import pytest

from tests.harness.devices import device_page
from vmm.devices.bus import mmio_bus, port_bus
from vmm.devices.legacy.exerciser import (
    COUNT_POSTED,
    COUNT_SYNCHRONOUS,
    END,
    EXERCISER_PORT,
    LAST_COUNT,
    LOCAL,
    LOCAL_VALUE,
    MAX_REPORTED,
    MMIO_COUNT,
    MMIO_LAST,
    PORT_COUNT,
    STRING,
    Exerciser,
    ExerciserPage,
)


class Machine:
    def __init__(self, page) -> None:
        self.log: list[str] = []
        self.codes: list[int] = []
        self.page = page
        self.device = Exerciser(self.log.append, self.codes.append)
        self.ports = port_bus(page.page)
        self.device.attach(self.ports.insert(self.device, EXERCISER_PORT, PORT_COUNT))
        self.mmio = mmio_bus(page.page)
        self.mmio.insert(ExerciserPage(self.device), 0, 0x1000)

    def out(self, register: int, value: int, size: int = 4) -> None:
        self.ports.write(EXERCISER_PORT + register, size, value)


@pytest.fixture
def machine():
    with device_page() as page:
        yield Machine(page)


def test_one_counter_over_all_registers(machine):
    machine.out(COUNT_POSTED, 1)
    machine.out(COUNT_SYNCHRONOUS, 2)
    machine.mmio.write(MMIO_COUNT, 8, 3)
    machine.out(COUNT_POSTED, 4, 1)
    assert machine.ports.read(EXERCISER_PORT + LAST_COUNT, 4) == 4
    assert machine.mmio.read(MMIO_LAST, 4) == 4
    machine.out(END, 0, 1)
    assert machine.codes == [0]


def test_small_counts_wrap(machine):
    for count in range(1, 600):
        machine.out(COUNT_POSTED, count, 1)
    machine.out(END, 0, 1)
    assert machine.codes == [0]


@pytest.mark.parametrize("counts", [(1, 3), (1, 1), (2,), (1, 2, 4, 3)], ids=["gap", "repeat", "first lost", "order"])
def test_a_wrong_sequence_is_noticed(machine, counts):
    for count in counts:
        machine.out(COUNT_POSTED, count)
    machine.out(END, 0, 1)
    assert machine.codes == [1]
    assert machine.device.errors


def test_the_guest_may_report_an_error_of_its_own(machine):
    machine.out(END, 1, 1)
    assert machine.codes == [1]


def test_string_bytes_continue_a_pattern(machine):
    for value in [*range(256), 0, 1]:
        machine.out(STRING, value, 1)
    assert [machine.ports.read(EXERCISER_PORT + STRING, 1) for _ in range(257)] == [*range(256), 0]
    assert machine.device.errors == 0
    machine.out(STRING, 7, 1)
    assert machine.device.errors == 1


def test_errors_do_not_flood_the_log(machine):
    for _ in range(1000):
        machine.out(COUNT_POSTED, 0)
    assert len(machine.log) == MAX_REPORTED


def test_what_is_published(machine):
    slots = machine.ports.windows()[0].slot
    assert [machine.page.write_posted(slots + port) for port in range(PORT_COUNT)] == [True] * 4 + [False] * 12
    assert machine.page.read_local(slots + LOCAL)
    assert machine.page.value(slots + LOCAL) == machine.ports.read(EXERCISER_PORT + LOCAL, 4) == LOCAL_VALUE
