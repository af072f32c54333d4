"""The serialised vCPU state: round trip, and a decoder that fails with its own error only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages import CpuidEntry, MsrValue
from ipc.schema import pack
from vcpu_worker import state
from vcpu_worker.errors import StateError
from vcpu_worker.kvm import abi

GOOD = state.VcpuState(
    version=1,
    vcpu=3,
    mp_state=0,
    regs=bytes(abi.REGS_SIZE),
    sregs=bytes(abi.SREGS_SIZE),
    sregs2=bytes(abi.SREGS2_SIZE),
    events=bytes(abi.VCPU_EVENTS_SIZE),
    debugregs=bytes(abi.DEBUGREGS_SIZE),
    xsave=bytes(abi.XSAVE_SIZE),
    xcrs=bytes(abi.XCRS_SIZE),
    lapic=bytes(abi.LAPIC_SIZE),
    msrs=(MsrValue(0x10, (1 << 64) - 1),),
    cpuid=(CpuidEntry(1, 0, 0, 1, 2, 3, 4),),
    tsc_khz=2_000_000,
    has_tsc_offset=True,
    tsc_offset=(1 << 64) - 5,
    clock=bytes(abi.CLOCK_SIZE),
)


def test_round_trip():
    assert state.decode(state.encode(GOOD)) == GOOD
    assert state.decode(state.encode(GOOD._replace(sregs2=b""))).sregs2 == b""


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": 0},
        {"regs": bytes(143)},
        {"sregs2": bytes(1)},
        {"xsave": bytes(4095)},
        {"xsave": bytes(40_000)},
        {"lapic": bytes(1025)},
        {"clock": b""},
        {"msrs": ((1, 2, 3),)},
        {"msrs": ((1 << 32, 1),)},
        {"cpuid": ((1,) * 6,)},
        {"has_tsc_offset": 1},
        {"tsc_khz": -1},
    ],
)
def test_wrong_values_are_refused(change: dict):
    values = GOOD._asdict() | change
    with pytest.raises(StateError):
        state.decode(pack(tuple(values.values())))


@given(st.binary(max_size=400))
def test_garbage_is_refused(data: bytes):
    with pytest.raises(StateError):
        state.decode(data)


@given(st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject):
    good = bytearray(state.encode(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = state.decode(bytes(good[: data.draw(st.integers(0, len(good)))]))
    except StateError:
        return
    assert state.decode(state.encode(decoded)) == decoded
