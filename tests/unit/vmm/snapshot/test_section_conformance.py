"""Every unit that has a state: saving changes nothing, and a unit that is made from a state saves that state."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devtool.project import ROOT
from tests.harness.devices import CountingLine, device_page, routes_at_once
from tests.harness.records import values_of
from tests.harness.virtio_transport import TestDevice
from tests.harness.virtqueues import guest_memory
from vmm.devices.bus import Device, port_bus
from vmm.devices.interrupts import InterruptLine
from vmm.devices.legacy.i8042 import I8042
from vmm.devices.legacy.ioapic import IoApic
from vmm.devices.legacy.pic import Pic
from vmm.devices.legacy.pit import LISTENING, Pit
from vmm.devices.legacy.serial import Serial
from vmm.devices.transport.mmio import MmioResources, MmioState, MmioTransport
from vmm.snapshot.microvm_state import sections

#: Those of virtio/ are held by tests/unit/virtio/test_device_conformance.py.
PACKAGES = ("vmm", "ipc", "base")


@contextmanager
def serial(**state: Any) -> Iterator[Serial]:
    line = CountingLine()
    yield Serial(line, lambda byte: None, **state)
    line.close()


@contextmanager
def i8042(**state: Any) -> Iterator[I8042]:
    line = CountingLine(1)
    yield I8042(line, lambda: None, **state)
    line.close()


@contextmanager
def ioapic(**state: Any) -> Iterator[IoApic]:
    yield IoApic({1, 4}, routes_at_once, lambda text: None, **state)


@contextmanager
def interrupt(**state: Any) -> Iterator[InterruptLine]:
    line = InterruptLine(4, **state)
    yield line
    line.close()


@contextmanager
def pic(**state: Any) -> Iterator[Pic]:
    yield Pic(lambda: None, lambda: None, **state)


@contextmanager
def pit(**state: Any) -> Iterator[Pit]:
    """Its clock stands still: what has passed since is part of the state."""
    yield Pit(lambda: None, lambda: LISTENING, lambda deadline: None, lambda: 1 << 50, **state)


@contextmanager
def mmio(state: MmioState | None = None) -> Iterator[MmioTransport]:
    """Of a device with two queues, wherever the state has it."""
    device = TestDevice(2, bytes(12))
    device.kind, device.id = (state.kind, state.id) if state else (4, "rng")
    line = CountingLine(state.gsi if state else 5)
    resources = MmioResources(state.address if state else 0xC0001000, line, -1)
    page = memoryview(bytearray(4096))
    with guest_memory() as memory:
        made = MmioTransport(
            device,
            memory,
            page,
            resources,
            guard=lambda call, failed: (True, call()),
            log=lambda text: None,
            state=state.registers if state else None,
        )
        yield made
        made.close()
        line.close()


#: How each unit is made: with `state=`, or as it is after a reset.
MAKERS: dict[type[Any], Callable[..., Any]] = {
    Serial: serial,
    I8042: i8042,
    IoApic: ioapic,
    Pic: pic,
    Pit: pit,
    InterruptLine: interrupt,
    MmioTransport: mmio,
}
#: How many offsets the windows of a device have.
SPANS: dict[type[Any], int] = {Serial: 8, I8042: 5, IoApic: 0x11, Pic: 6, Pit: 5, MmioTransport: 4096}
UNITS = pytest.mark.parametrize("unit", MAKERS, ids=lambda unit: unit.__name__)


def classes_with_a_section() -> Iterator[type[Any]]:
    """Find them by the assignment in their source."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_bytes()).body:
                if isinstance(node, ast.ClassDef) and any(
                    isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == "SECTION"
                    for each in node.body
                ):
                    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                    yield getattr(importlib.import_module(module), node.name)


def test_no_unit_is_left_out():
    found = set(classes_with_a_section())
    assert found == set(MAKERS)
    assert {unit.SECTION for unit in found} <= set(sections())


def test_names_are_given_once_and_every_section_is_described():
    names = [section.name for section in sections()]
    assert len(set(names)) == len(names)
    page = (ROOT / "docs" / "formats" / "microvm-state.md").read_text()
    for section in sections():
        assert f"| `{section.name}` | {section.version} |" in page, section.name
        for name, _ in section.fields.fields:
            assert name in page.partition(f"| `{section.name}` |")[2].partition("\n")[0], f"{section.name}.{name}"


@UNITS
def test_what_is_saved_after_a_reset_is_within_its_bounds(unit):
    with MAKERS[unit]() as fresh:
        state = fresh.save()
        assert fresh.save() == state
        assert unit.SECTION.fields.check(state, "fresh") == state
    with MAKERS[unit](state=state) as restored:
        assert restored.save() == state
        assert isinstance(restored.instance, str)


@UNITS
@given(data=st.data())
def test_a_unit_that_is_made_from_a_state_saves_that_state(unit, data):
    """From any state that the bounds allow, honest or not: nothing is lost, nothing is mended."""
    state = data.draw(values_of(unit.SECTION.fields))
    with MAKERS[unit](state=state) as made:
        assert made.save() == state
        assert made.save() == state


@UNITS
@given(data=st.data())
def test_a_restored_device_answers_whatever_the_guest_does(unit, data):
    """It raises nothing, stays within its bounds, and publishes what it would answer."""
    if not issubclass(unit, Device):
        return
    accesses = data.draw(
        st.lists(st.tuples(st.booleans(), st.integers(0, SPANS[unit] - 1), st.integers(0, 255)), max_size=30)
    )
    with MAKERS[unit](state=data.draw(values_of(unit.SECTION.fields))) as made, device_page() as page:
        if unit in (Serial, I8042):
            made.attach(port_bus(page.page).insert(made, 0x100, SPANS[unit]))
        for write, offset, value in accesses:
            if write:
                made.write(offset, 1, value)
            else:
                made.read(offset, 1)
            unit.SECTION.fields.check(made.save(), "after an access")
