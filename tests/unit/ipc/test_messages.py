"""The messages: numbers that never change, round trips, and everything that is out of bounds is refused."""

from __future__ import annotations

import signal
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.device_pages import SLOT_COUNT
from ipc.errors import MessageError
from ipc.launch_plan import MAX_WORKERS
from ipc.messages.descriptors import DESCRIPTORS
from ipc.messages.device import DEVICE, DEVICE_DESCRIPTORS
from ipc.messages.records import WORKER
from ipc.messages.supervisor import SUPERVISOR, SignalCell, Spawn
from ipc.messages.vm import SetWindows
from ipc.messages.worker import Pong, Resumed
from ipc.schema import (
    MAX_FRAME_SIZE,
    PROTOCOL_VERSION,
    U64,
    Envelope,
    Int,
    ListOf,
    RecordOf,
    decode,
    encode,
    pack,
    unpack,
)
from tests.harness.schemas import largest, messages_of, plain, records_of, smallest, wrong_values

SCHEMAS = {
    "worker": WORKER,
    "supervisor": SUPERVISOR,
    "descriptors": DESCRIPTORS,
    "device": DEVICE,
    "device descriptors": DEVICE_DESCRIPTORS,
}

#: docs/formats/messages.md. A number is never given to another message: add, do not change.
KINDS = {
    "worker": {
        1: "Failed",
        2: "Hello",
        3: "Welcome",
        4: "Configure",
        5: "Configured",
        6: "SetRoutes",
        7: "RoutesSet",
        8: "Resume",
        9: "Resumed",
        10: "Pause",
        11: "Paused",
        12: "SaveState",
        13: "SavedState",
        14: "DumpCpuConfig",
        15: "DumpedCpuConfig",
        16: "Ping",
        17: "Pong",
        18: "Finish",
        19: "Finished",
        20: "VcpuExited",
        21: "GhostEvent",
        22: "GhostEventDone",
        23: "Noted",
        24: "PlaceStub",
        25: "StubPlaced",
        26: "StartVcpu",
        27: "RaiseInterrupt",
        28: "InterruptRaised",
        29: "OpenIpiTarget",
        30: "OpenIpiSource",
        31: "IpiPathOpen",
        32: "ParkGhosts",
        33: "GhostsParked",
        34: "ReadClock",
        35: "ClockRead",
        36: "SetClock",
        37: "ClockSet",
        # 38 and 39 were ReportGhosts and GhostsReported.
        40: "GhostRecovered",
        41: "ReadHostCpu",
        42: "HostCpuRead",
        43: "HandOver",
        44: "HandedOver",
        45: "RollBack",
        46: "RolledBack",
        47: "LoadState",
        48: "StateLoaded",
        49: "TakeOver",
        50: "TakenOver",
        61: "InitVcpu",
        62: "ReadQuiescence",
        63: "QuiescenceRead",
        64: "AddInterrupts",
        65: "SetWindows",
        66: "MapMemory",
        67: "UnmapMemory",
        68: "AddDoorbell",
        69: "RemoveDoorbell",
        70: "VmChanged",
    },
    "supervisor": {
        1: "Failed",
        2: "Spawn",
        3: "Spawned",
        4: "SignalCell",
        5: "Signalled",
        6: "CreateMemory",
        7: "MemoryCreated",
        8: "CellEnded",
        9: "Shutdown",
        10: "SignalNoticed",
    },
    "descriptors": {
        1: "GuestMemory",
        2: "DevicePages",
        3: "ExitRing",
        4: "Interrupt",
        5: "VcpuDescriptor",
        6: "IpiPath",
        7: "ExternalInterrupt",
        8: "MemoryObject",
        9: "DoorbellEvent",
    },
    "device": {
        1: "Failed",
        2: "Hello",
        3: "Welcome",
        4: "MapGuestMemory",
        5: "MemoryMapped",
        6: "Attach",
        7: "Attached",
        8: "Tighten",
        9: "Tightened",
        10: "Activate",
        11: "Activated",
        12: "Stop",
        13: "Stopped",
        14: "Reset",
        15: "ResetDone",
        16: "WriteConfig",
        17: "ConfigWritten",
        18: "UpdateLimiter",
        19: "UpdateFiles",
        20: "Updated",
        21: "ReadState",
        22: "StateRead",
        23: "Collect",
        24: "Collected",
        25: "ConfigChanged",
        26: "ConfigTaken",
        27: "NeedsReset",
        28: "Noted",
        29: "Ping",
        30: "Pong",
        31: "Finish",
        32: "Finished",
    },
    "device descriptors": {
        1: "GuestMemoryFile",
        2: "DeviceEvents",
        3: "DeviceFiles",
    },
}

ALL_MESSAGES = [
    pytest.param(schema, field, id=f"{name}-{record.__name__}")
    for name, schema in SCHEMAS.items()
    for record, field in records_of(schema).items()
]
envelopes = st.builds(
    Envelope, st.integers(0, U64), st.integers(1, U64), st.integers(0, U64), st.integers(0, U64), st.none()
)


@pytest.mark.parametrize("name", SCHEMAS)
def test_numbers_never_change(name):
    found = {number: record.__name__ for record, number in SCHEMAS[name].kinds().items()}
    assert found == KINDS[name]


@pytest.mark.soak("ipc")
@pytest.mark.parametrize("name", SCHEMAS)
def test_round_trip(name, scale):
    schema = SCHEMAS[name]

    @settings(max_examples=scale(300, 20_000))
    @given(envelopes, messages_of(schema))
    def run(envelope, message) -> None:
        sent = envelope._replace(message=message)
        frame = encode(schema, sent)
        received = decode(schema, frame)
        assert received == sent
        assert type(received.message) is type(message)
        assert decode(schema, memoryview(frame)) == decode(schema, bytearray(frame)) == received
        hash(received)  # tuples all the way down: a receiver can keep it and nobody can change it

    run()


@pytest.mark.parametrize(("schema", "field"), ALL_MESSAGES)
def test_largest_and_smallest_fit(schema, field):
    for message in (largest(field), smallest(field)):
        envelope = Envelope(U64, U64, U64, U64, message)
        assert decode(schema, encode(schema, envelope)) == envelope


@pytest.mark.parametrize(("schema", "field"), ALL_MESSAGES)
def test_wrong_values_are_refused(schema, field):
    kind = schema.kinds()[field.record]
    good = plain(smallest(field))
    refused = 0
    for wrong in wrong_values(field):
        if wrong == good:
            continue
        try:
            frame = msgpack.packb((PROTOCOL_VERSION, 1, 1, 0, 0, kind, wrong))
        except (ValueError, OverflowError):
            continue  # nobody can even send it
        with pytest.raises(MessageError):
            decode(schema, frame)
        refused += 1
    assert refused > 5


@pytest.mark.parametrize(("schema", "field"), ALL_MESSAGES)
def test_wrong_values_are_not_sent(schema, field):
    good = smallest(field)
    for index, (_, part) in enumerate(field.fields):
        for wrong in wrong_values(part):
            message = field.record._make((*good[:index], wrong, *good[index + 1 :]))
            with pytest.raises(MessageError):
                encode(schema, Envelope(1, 1, 0, 0, message))


def test_messages_of_another_channel_are_refused():
    with pytest.raises(MessageError, match="not a message of this channel"):
        encode(WORKER, Envelope(1, 1, 0, 0, Spawn(0, (0,), ())))
    for kind in (-1, 0, 21, 255, 256, True, 1.0, None, "1", b"1", [], [1], 1 << 63):
        with pytest.raises(MessageError):
            decode(WORKER, msgpack.packb((PROTOCOL_VERSION, 1, 1, 0, 0, kind, ())))
    for other in ((1, 2), None, "Pong", Pong):
        with pytest.raises(MessageError):
            encode(WORKER, Envelope(1, 1, 0, 0, other))


VERSIONS: tuple[Any, ...] = (PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, True, 1.0, "1", None, [])
NUMBERS: tuple[Any, ...] = (-1, 1.0, True, None, "1", b"1", [], [1])
CONTENTS: tuple[Any, ...] = (None, 0, "", b"", {}, [0], False)
NO_ENVELOPES: tuple[Any, ...] = (None, 1, "x", b"x", [], {}, 1.5, True)
GOOD = (PROTOCOL_VERSION, 1, 1, 0, 0, 9, ())


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        *((0, wrong) for wrong in VERSIONS),
        *((part, wrong) for part in (1, 2, 3, 4) for wrong in NUMBERS),
        (2, 0),
        *((6, wrong) for wrong in CONTENTS),
    ],
)
def test_each_part_of_an_envelope_is_checked(part, wrong):
    assert decode(WORKER, msgpack.packb(GOOD)).message == Resumed()
    with pytest.raises(MessageError):
        decode(WORKER, msgpack.packb((*GOOD[:part], wrong, *GOOD[part + 1 :])))


@pytest.mark.parametrize("value", [*NO_ENVELOPES, GOOD[:6], (*GOOD, 0), [GOOD]])
def test_what_is_no_envelope_is_refused(value):
    with pytest.raises(MessageError):
        decode(WORKER, msgpack.packb(value))


def test_enum_members_are_sent_as_their_numbers():
    """``signal.SIGKILL`` is no ``int`` by type; a kill must go out all the same, and arrive as a plain number."""
    received = decode(SUPERVISOR, encode(SUPERVISOR, Envelope(1, 1, 0, 0, SignalCell(0, 77, signal.SIGKILL))))
    assert received.message == SignalCell(0, 77, 9)
    assert type(received.message.signal) is int


def test_a_text_that_is_no_unicode_is_a_message_error():
    """A file name from the command line may hold lone surrogates."""
    with pytest.raises(MessageError, match="cannot be serialised"):
        encode(WORKER, Envelope(1, 1, 0, 0, Pong("\udcff")))
    with pytest.raises(MessageError):
        pack(object())
    with pytest.raises(MessageError):
        pack(1 << 64)


def test_frames_are_bounded_when_sent():
    pack(bytes(MAX_FRAME_SIZE - 5))
    with pytest.raises(MessageError, match="exceeds"):
        pack(bytes(MAX_FRAME_SIZE))


def test_frames_are_bounded_when_received():
    assert unpack(msgpack.packb(bytes(MAX_FRAME_SIZE - 5))) == bytes(MAX_FRAME_SIZE - 5)
    with pytest.raises(MessageError, match="exceeds"):
        unpack(msgpack.packb(bytes(MAX_FRAME_SIZE - 4)))


def test_bounds_fit_the_layouts():
    """A slot of the device page and a worker's index can be used as they come."""
    windows = dict(records_of(WORKER)[SetWindows].fields)["ports"]
    assert isinstance(windows, ListOf)
    assert isinstance(windows.item, RecordOf)
    slot = dict(windows.item.fields)["slot"]
    worker = dict(records_of(SUPERVISOR)[Spawn].fields)["worker"]
    assert isinstance(slot, Int)
    assert isinstance(worker, Int)
    assert (slot.high, worker.high) == (SLOT_COUNT - 1, MAX_WORKERS - 1)
