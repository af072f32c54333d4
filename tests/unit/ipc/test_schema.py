"""The schema says where in a message something is wrong, at any depth, and takes what is right as it is."""

from __future__ import annotations

import signal
from typing import NamedTuple

import pytest

from ipc.errors import MessageError
from ipc.messages.records import WORKER, CpuidEntry, MsrChange
from ipc.messages.supervisor import SUPERVISOR, SignalCell
from ipc.messages.worker import HostCpuRead
from ipc.schema import U32, Flag, Int, ListOf, RecordOf, Schema, Text
from tests.harness.cells import configure_message

ENTRY = CpuidEntry(1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (HostCpuRead((ENTRY, ENTRY._replace(ebx=1 << 32))), "HostCpuRead.cpuid.ebx: expected an integer from 0 to"),
        (HostCpuRead((ENTRY._replace(leaf=True),)), "HostCpuRead.cpuid.leaf: expected an integer"),
        (HostCpuRead(((1, 2, 3),)), "HostCpuRead.cpuid: expected a record of 7 values"),  # type: ignore[arg-type]
        (HostCpuRead(7), "HostCpuRead.cpuid: expected a list of at most 256 values"),  # type: ignore[arg-type]
        (configure_message(smt=1), "Configure.smt: expected a boolean"),
        (configure_message(msr_changes=(MsrChange(0, -1, 0),)), "Configure.msr_changes.mask: expected an integer"),
    ],
)
def test_what_is_wrong_is_named(message, text):
    with pytest.raises(MessageError) as error:
        WORKER.to_wire(message)
    assert str(error.value).startswith(text)


def test_a_received_value_is_named_too():
    with pytest.raises(MessageError, match=r"^HostCpuRead\.cpuid\.edx: expected an integer from 0 to 4294967295$"):
        WORKER.from_wire(42, [[[0, 0, 0, 0, 0, 0, -1]]])


def test_members_of_an_enum_become_integers():
    assert SUPERVISOR.to_wire(SignalCell(1, 2, signal.SIGKILL)) == (4, (1, 2, 9, "vcpu"))
    schema = Schema()
    schema.register(1, MsrChange, register=Int(U32), mask=Int(U32), value=Int(U32))
    _, values = schema.to_wire(MsrChange(signal.SIGKILL, 0, 0))
    assert [type(value) for value in values] == [int, int, int]


def test_a_field_that_stands_alone_is_named_by_its_user():
    field = ListOf(RecordOf(CapabilityLike, number=Int(3), name=Text(2), on=Flag()), 2)
    assert field.check([[1, "ab", True]], "here") == (CapabilityLike(1, "ab", True),)
    with pytest.raises(MessageError, match=r"^here\.name: expected a string of at most 2 characters$"):
        field.check([[1, "ab", True], [1, "abc", True]], "here")


class CapabilityLike(NamedTuple):
    """Fields of different kinds."""

    number: int
    name: str
    on: bool
