"""The state of a whole microVM: exact round trip, and what must hold between its sections."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipc.messages.ghosts import QuiescentGhost
from ipc.messages.records import MemoryRegion
from ipc.messages.worker import SavedState
from tests.harness.devices import routes_at_once
from tests.harness.records import values_of
from vmm.devices.interrupts import InterruptState
from vmm.devices.legacy.serial import SerialState
from vmm.devices.manager import DeviceManager
from vmm.layout import COM1_PORT, I8042_DATA_PORT
from vmm.operations.quiescence import QuiescentWorker
from vmm.snapshot.microvm_state import MachineState, MicrovmState, decode, device_sections, encode, of_devices
from vmm.snapshot.state_file import MicrovmStateError

REGION = MemoryRegion(0, 1, 0)
#: One of each section; lines have a GSI.
ANY_DEVICES = st.fixed_dictionaries(
    {
        (section.name, "4" if section.name == "interrupt" else ""): values_of(section.fields)
        for section in device_sections()
    }
)


@st.composite
def states(draw: st.DrawFn) -> MicrovmState:
    count = draw(st.integers(1, 4))
    split = draw(st.booleans())
    groups = tuple((index,) for index in range(count)) if split else (tuple(range(count)),)
    ghost = st.builds(QuiescentGhost, st.integers(0, 3), st.booleans(), st.integers(0, 4), *[st.just(0)] * 3)
    ghosts = tuple(draw(st.lists(ghost, max_size=4)))
    return MicrovmState(
        MachineState(draw(st.text("abc-", min_size=1, max_size=64)), (REGION,), groups),
        draw(ANY_DEVICES),
        tuple(QuiescentWorker(worker, 0, 0, ghosts) for worker in range(len(groups))),
        tuple(SavedState(index, 1, draw(st.binary(max_size=100))) for index in range(count)),
    )


def manager() -> DeviceManager:
    return DeviceManager(transmit=lambda _: None, reset=lambda: None, set_routes=routes_at_once, log=print)


def test_the_state_of_the_devices_is_what_the_guest_has_written():
    """Serial: divisor, registers, unread input; i8042: a command that waits for its argument; IOAPIC: an entry."""
    machine = manager()
    for register, value in ((3, 0x83), (0, 0x34), (1, 0x12), (3, 0x03), (1, 0x01), (7, 0x5A)):
        machine.ports.write(COM1_PORT + register, 1, value)
    machine.serial.receive(b"typed")
    machine.ports.write(I8042_DATA_PORT + 4, 1, 0x60)
    machine.i8042.send_ctrl_alt_del()
    machine.ioapic.write(0, 4, 0x10 + 2 * 4)
    machine.ioapic.write(0x10, 4, 0x31)
    saved = of_devices(machine.units)
    assert of_devices(machine.units) == saved
    machine.close()
    assert saved["serial", ""] == SerialState(b"typed", 1, 0, 3, 8, 0x5A, 0x1234, False, False)
    assert (saved["i8042", ""].buffer, saved["i8042", ""].argument_of) == (b"\x14\x11\xe0\x71", 0x60)
    assert (saved["ioapic", ""].select, saved["ioapic", ""].entries[4]) == (0x18, 0x31)
    assert saved["ioapic", ""].entries[5] == 1 << 16
    # The worker that would take the edges is not there: they wait.
    assert saved["interrupt", "1"] == saved["interrupt", "4"] == InterruptState(True)


@given(states())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_round_trip(saved):
    assert decode(encode(saved)) == saved


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data):
    with pytest.raises(MicrovmStateError):
        decode(data)


def small_state() -> MicrovmState:
    machine = manager()
    try:
        devices = of_devices(machine.units)
    finally:
        machine.close()
    return MicrovmState(
        MachineState("a", (REGION,), ((0,),)), devices, (QuiescentWorker(0, 0, 0, ()),), (SavedState(0, 1, b""),)
    )


HELD = QuiescentGhost(1, True, 0, 0, 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quiescence": ()}, "at rest"),
        ({"quiescence": (QuiescentWorker(0, 1, 0, ()),)}, "open_events"),
        ({"quiescence": (QuiescentWorker(0, 0, 0, (HELD,)),)}, "in_service"),
        ({"quiescence": (QuiescentWorker(1, 0, 0, ()),)}, "not numbered"),
        ({"machine": MachineState("a", (REGION,), ((0,), (1,)))}, "not those of the workers"),
        ({"machine": MachineState("a", (REGION,), ((0, 0),))}, "not those of the workers"),
        ({"machine": MachineState("a", (), ((0,),))}, "regions"),
        ({"vcpus": ()}, "not those of the workers"),
        ({"vcpus": (SavedState(1, 1, b""),)}, "not numbered"),
        ({"devices": {}}, "missing"),
    ],
)
def test_what_does_not_hold_together_is_refused(change, message):
    saved = small_state()
    assert decode(encode(saved)) == saved
    with pytest.raises(MicrovmStateError, match=message):
        decode(encode(saved._replace(**change)))
