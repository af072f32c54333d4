"""The serialised vCPU state: round trip, and a decoder that fails with its own error only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.records import CpuidEntry, MsrValue
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


def lapic_page(lvt: int, initial: int, current: int, *, requested: int = 0, in_service: int = 0) -> bytes:
    page = bytearray(abi.LAPIC_SIZE)
    for offset, value in ((abi.APIC_LVTT, lvt), (abi.APIC_TMICT, initial), (abi.APIC_TMCCT, current)):
        page[offset : offset + 4] = value.to_bytes(4, "little")
    for register, vector in ((abi.APIC_IRR, requested), (abi.APIC_ISR, in_service)):
        if vector:
            page[register + (vector >> 5) * 16 + (vector >> 3 & 3)] |= 1 << (vector & 7)
    return bytes(page)


ONE_SHOT, PERIODIC, DEADLINE = 0xEC, 0xEC | 1 << 17, 0xEC | 2 << 17


@pytest.mark.parametrize(
    ("page", "starts_again"),
    [
        (lapic_page(ONE_SHOT, 1000, 10), True),
        (lapic_page(ONE_SHOT, 1000, 0), True),  # its interrupt may not have been delivered
        (lapic_page(ONE_SHOT, 1000, 0, requested=0xEC), False),
        (lapic_page(ONE_SHOT, 1000, 0, in_service=0xEC), False),
        (lapic_page(ONE_SHOT, 1000, 0, requested=0xED), True),
        (lapic_page(ONE_SHOT, 1000, 10, in_service=0xEC), True),  # started again by its handler
        (lapic_page(PERIODIC, 1000, 0, requested=0xEC), True),
        (lapic_page(DEADLINE, 0, 0, requested=0xEC), True),
    ],
)
def test_a_one_shot_timer_that_has_fired_does_not_start_again(page: bytes, starts_again: bool):
    loaded = state.timer_that_goes_on(page)
    assert (loaded == page) is starts_again
    if not starts_again:
        assert loaded == page[: abi.APIC_TMICT] + bytes(4) + page[abi.APIC_TMICT + 4 :]
