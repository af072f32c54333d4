"""The record of a microVM's state: exact round trip, bounds, and nothing but its own error for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.ghosts import QuiescentGhost
from ipc.messages.records import MemoryRegion
from ipc.messages.worker import SavedState
from vmm.devices.manager import DeviceManager
from vmm.layout import COM1_PORT, I8042_DATA_PORT, IOAPIC_PIN_COUNT
from vmm.snapshot import state_file
from vmm.snapshot.state_file import (
    DevicesState,
    I8042State,
    InterruptState,
    IoApicState,
    MicrovmState,
    MicrovmStateError,
    QuiescentWorker,
    SerialState,
    decode,
    encode,
)

ZEROS = [st.just(0)] * 3
BYTE = st.integers(0, 255)
DEVICES = st.builds(
    DevicesState,
    st.builds(
        IoApicState,
        BYTE,
        st.integers(0, 15),
        st.tuples(*[st.integers(0, (1 << 64) - 1)] * IOAPIC_PIN_COUNT),
    ),
    st.builds(
        SerialState,
        st.binary(max_size=64),
        BYTE,
        BYTE,
        BYTE,
        BYTE,
        BYTE,
        st.integers(0, 65535),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(I8042State, st.binary(max_size=16), st.booleans(), BYTE, BYTE, BYTE, BYTE, st.booleans()),
    st.lists(st.builds(InterruptState, st.integers(0, 4095), st.booleans()), max_size=4).map(tuple),
)


@st.composite
def states(draw: st.DrawFn) -> MicrovmState:
    count = draw(st.integers(1, 4))
    split = draw(st.booleans())
    groups = tuple((index,) for index in range(count)) if split else (tuple(range(count)),)
    ghosts = draw(st.lists(st.builds(QuiescentGhost, st.integers(0, 3), st.booleans(), st.integers(0, 4), *ZEROS)))
    return MicrovmState(
        state_file.VERSION,
        draw(st.text("abc-", min_size=1, max_size=64)),
        (MemoryRegion(0, draw(st.integers(1, 1 << 30)), 0),),
        groups,
        draw(DEVICES),
        tuple(QuiescentWorker(worker, 0, 0, tuple(ghosts[:31])) for worker in range(len(groups))),
        tuple(SavedState(index, 1, draw(st.binary(max_size=100))) for index in range(count)),
    )


def manager() -> DeviceManager:
    return DeviceManager(transmit=lambda _: None, reset=lambda: None, set_routes=lambda _, done: done(), log=print)


def fresh_devices() -> DevicesState:
    machine = manager()
    try:
        return machine.save_state()
    finally:
        machine.close()


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
    saved = machine.save_state()
    assert machine.save_state() == saved
    machine.close()
    assert saved.serial == SerialState(b"typed", 1, 0, 3, 8, 0x5A, 0x1234, False, False)
    assert (saved.i8042.buffer, saved.i8042.argument_of) == (b"\x14\x11\xe0\x71", 0x60)
    assert (saved.ioapic.select, saved.ioapic.entries[4]) == (0x18, 0x31)
    assert saved.ioapic.entries[5] == 1 << 16
    # The worker that would take the edges is not there: they wait.
    assert saved.interrupts == (InterruptState(1, True), InterruptState(4, True))


@given(states())
def test_round_trip(saved):
    assert decode(encode(saved)) == saved


@given(states(), st.data())
def test_damaged_bytes_are_refused_or_a_state(saved, data):
    """Whatever is cut off, added or changed: a state or MicrovmStateError, nothing else."""
    whole = bytearray(encode(saved))
    kind = data.draw(st.sampled_from(["cut", "add", "change"]))
    if kind == "cut":
        with pytest.raises(MicrovmStateError):
            decode(bytes(whole[: data.draw(st.integers(0, len(whole) - 1))]))
    elif kind == "add":
        with pytest.raises(MicrovmStateError):
            decode(bytes(whole) + data.draw(st.binary(min_size=1, max_size=8)))
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(BYTE)
        try:
            decode(bytes(whole))
        except MicrovmStateError:
            pass


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data):
    with pytest.raises(MicrovmStateError):
        decode(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version"),
        ({"quiescence": ()}, "at rest"),
        ({"quiescence": (QuiescentWorker(0, 1, 0, ()),)}, "open_events"),
        ({"quiescence": (QuiescentWorker(0, 0, 0, (QuiescentGhost(1, True, 0, 0, 1, 0),)),)}, "in_service"),
        ({"groups": ((0,), (1,))}, "not those of the workers"),
        ({"vcpus": ()}, "vcpu_count"),
    ],
)
def test_what_is_out_of_bounds_is_refused(change, message):
    devices = fresh_devices()
    quiescence = (QuiescentWorker(0, 0, 0, ()),)
    saved = MicrovmState(2, "a", (MemoryRegion(0, 1, 0),), ((0,),), devices, quiescence, (SavedState(0, 1, b""),))
    assert decode(encode(saved)) == saved
    with pytest.raises(MicrovmStateError, match=message):
        decode(encode(saved._replace(**change)))
