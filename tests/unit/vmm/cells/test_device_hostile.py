"""A device in a cell that says what it likes: nothing but a breach, or something that its guest alone sees, follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.deferral import Deferral
from ipc.device_pages import RegisterPages
from ipc.messages import device as messages
from ipc.messages.device import DEVICE, ConfigChanged, NeedsReset
from tests.harness.schemas import records_of, values_of
from tests.harness.virtqueues import FEATURES, RINGS, guest_memory
from virtio.driver import lay_out
from virtio.entropy import COUNTERS, Entropy
from virtio.entropy import FEATURES as ENTROPY_FEATURES
from virtio.queue import QueueConfig
from virtio.rate_limiter import Bucket
from vmm.cells.device import CellDevice, DeviceModel
from vmm.devices.interrupts import InterruptLine
from vmm.devices.transport.mmio import MmioResources, MmioTransport

MODEL = DeviceModel(4, "rng", (256,), ENTROPY_FEATURES, b"", b"", Entropy.SECTION, COUNTERS)
EVENTS = st.one_of(*[values_of(records_of(DEVICE)[each]) for each in (ConfigChanged, NeedsReset)])


class Cell:
    """In the place of a DeviceCell: what it is asked waits for an answer, which a test makes up."""

    def __init__(self) -> None:
        self.ready = True
        self.breaches: list[str] = []
        self.asked: list[tuple[Any, type[Any], Callable[[Any, str], None]]] = []

    def ask(self, message: Any, expected: type[Any], answered: Callable[[Any, str], None], *, timeout_ns: int) -> None:
        self.asked.append((message, expected, answered))

    def send_descriptors(self, message: Any, descriptors: tuple[int, ...]) -> None:
        """Nobody takes them."""

    def breach(self, text: str) -> None:
        self.breaches.append(text)
        self.ready = False
        self.asked.clear()

    def answer(self, **values: Any) -> None:
        """Answer the oldest command."""
        _, expected, answered = self.asked.pop(0)
        answered(expected(**values), "")


class Place:
    """A device, its transport, and its cell."""

    def __init__(self, memory: Any, page: memoryview) -> None:
        self.memory = memory
        self.cell = Cell()
        self.later: list[Callable[[], None]] = []
        self.device = CellDevice(MODEL)
        self.device.cell = self.cell  # type: ignore[assignment]
        self.device.soon = self.later.append
        self.line = InterruptLine(5)
        self.transport = self.device.transport = MmioTransport(
            self.device,
            memory,
            page,
            MmioResources(0xC000_1000, self.line, -1),
            guard=lambda call, _: (True, call()),
            log=lambda text: None,
        )

    def drive(self) -> Deferral | None:
        """Do what a driver does until DRIVER_OK; return what the vCPU waits for."""
        config = QueueConfig(16)
        lay_out(config, RINGS)
        write = self.transport.write
        for offset, value in (
            (0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, FEATURES & 0xFFFF_FFFF), (0x24, 1),
            (0x20, FEATURES >> 32), (0x70, 11), (0x38, 16), (0x80, config.descriptor_table),
            (0x90, config.available_ring), (0xA0, config.used_ring), (0x44, 1),
        ):  # fmt: skip
            write(offset, 4, value)
        self.cell.asked.clear()  # the reset
        return write(0x70, 4, 15)

    def close(self) -> None:
        self.transport.close()
        self.line.close()
        self.device.close()


@contextmanager
def place() -> Iterator[Place]:
    pages = RegisterPages(1)
    with guest_memory() as memory:
        found = Place(memory, pages.page(0))
        try:
            yield found
        finally:
            found.close()
            pages.close()


def test_the_vcpu_waits_until_the_cell_serves_the_queue():
    with place() as found:
        waits = found.drive()
        assert waits is not None
        assert not waits.done
        found.cell.answer(again=0)
        assert waits.done
        assert not found.cell.breaches


def test_where_the_queues_stand_is_noted_when_the_device_has_stopped():
    with place() as found:
        found.drive()
        found.cell.answer(again=0)
        stopped = found.transport.pause()
        assert stopped is not None
        assert not stopped.done
        found.cell.answer(queues=(messages.QueuePosition(7, 7),), state=b"")
        assert stopped.done
        assert found.transport.save_registers().queues[0][-2:] == (7, 7)


def test_a_device_that_is_to_stop_twice_stops_once():
    """A pause that took too long is tried again."""
    with place() as found:
        found.drive()
        found.cell.answer(again=0)
        stops = [found.transport.pause() for _ in range(3)]
        assert len(found.cell.asked) == 1
        found.cell.answer(queues=(messages.QueuePosition(0, 0),), state=b"")
        assert all(each is not None and each.done for each in stops)
        assert found.device.activation is None


def test_a_cell_that_ends_leaves_nobody_waiting_for_its_answer():
    """What was asked of it is asked of the next one: to go on with the queues, then to stop."""
    with place() as found:
        activated = found.drive()
        assert activated is not None
        found.cell.asked.clear()
        found.device.cell_lost()
        found.device.cell_ready()
        message, _, _ = found.cell.asked[0]
        assert message.recover
        found.cell.answer(again=3)
        assert activated.done
        assert found.device.again == 3
        stopped = found.transport.pause()
        found.cell.asked.clear()
        found.device.cell_lost()
        found.device.cell_ready()
        found.cell.answer(again=0)
        found.cell.answer(queues=(messages.QueuePosition(1, 1),), state=b"")
        assert stopped is not None
        assert stopped.done


def test_a_device_that_is_given_up_needs_a_reset_and_holds_nobody():
    with place() as found:
        activated = found.drive()
        found.device.cell_lost()
        found.cell.ready = False
        found.cell.asked.clear()
        found.device.give_up("a crash loop")
        assert activated is not None
        assert activated.done
        assert found.transport.needs_reset_count == 1
        assert found.transport.pause() is None


@pytest.mark.parametrize(
    "events",
    [
        [NeedsReset(0, "once"), NeedsReset(0, "twice")],
        [ConfigChanged(0, b"a"), ConfigChanged(0, b"b")],
    ],
)
def test_events_that_are_not_due_are_a_breach(events):
    with place() as found:
        found.drive()
        found.cell.answer(again=0)
        for event in events:
            found.device.handle(event)
        assert len(found.cell.breaches) == 1


def test_counters_that_run_backwards_are_a_breach():
    with place() as found:
        for value in (5, 4):
            found.device.ask_counters(lambda: None)
            found.cell.answer(values=(value,) * 7, aggregates=())
        assert len(found.cell.breaches) == 1


@pytest.mark.soak("virtio")
def test_nothing_but_a_breach_follows_from_what_a_cell_says(scale):
    @settings(max_examples=scale(200, 20_000), deadline=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with place() as found:
            found.drive()
            for _ in range(data.draw(st.integers(1, 12))):
                _act(found, data)

    run()


def _act(found: Place, data: st.DataObject) -> None:
    device, cell = found.device, found.cell
    step = data.draw(st.sampled_from(["answer", "answer", "event", "stop", "resume", "limit", "count", "lost", "soon"]))
    if step == "answer" and cell.asked:
        _, expected, answered = cell.asked.pop(0)
        answered(data.draw(values_of(records_of(DEVICE)[expected])), "")
    elif step == "event":
        device.handle(data.draw(EVENTS))
    elif step == "stop":
        found.transport.pause()
    elif step == "resume":
        found.transport.resume()
    elif step == "limit":
        device.update_limiter(Bucket(1, 1), None)
    elif step == "count":
        device.ask_counters(lambda: None)
    elif step == "lost":
        cell.asked.clear()
        device.cell_lost()
        cell.ready = True
        device.cell_ready()
    while step == "soon" and found.later:
        found.later.pop(0)()
