"""Boot registers → the kernel's structures."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages.records import BootRegisters
from vcpu_worker.cpu import boot_state, msr
from vcpu_worker.kvm import abi

BOOT = BootRegisters(
    rip=0x100_0200,
    rsp=0x8FF0,
    rbp=0x8FF0,
    rsi=0x7000,
    rbx=0x6000,
    rflags=2,
    cr0=0x8000_0011,
    cr3=0x9000,
    cr4=0x20,
    efer=0x500,
    gdt_base=0x500,
    gdt=(0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x008F_8B00_0000_FFFF),
    idt_base=0x520,
    idt_limit=7,
)


def segment_fields(packed: bytes) -> dict[str, int]:
    names = "base limit selector type present dpl db s l g avl unusable padding".split()
    return dict(zip(names, abi.SEGMENT.unpack(packed), strict=True))


@pytest.mark.parametrize(
    ("descriptor", "fields"),
    [
        (0x00AF_9B00_0000_FFFF, {"type": 11, "s": 1, "l": 1, "db": 0, "g": 1, "limit": 0xFFFF_FFFF, "present": 1}),
        (0x00CF_9B00_0000_FFFF, {"type": 11, "s": 1, "l": 0, "db": 1, "g": 1, "limit": 0xFFFF_FFFF, "dpl": 0}),
        (0x00CF_F300_0000_FFFF, {"type": 3, "dpl": 3, "s": 1}),
        (0x0000_8B00_0000_0067, {"type": 11, "s": 0, "g": 0, "limit": 0x67, "unusable": 0}),
        (0, {"present": 0, "unusable": 1, "type": 0}),
        (0x12 << 56 | 0xF << 48 | 0x34_5678 << 16 | 1, {"base": 0x1234_5678, "limit": 0xF_0001}),
    ],
)
def test_segment(descriptor: int, fields: dict[str, int]):
    found = segment_fields(boot_state.segment(0x10, descriptor))
    assert {name: found[name] for name in fields} == fields
    assert found["selector"] == 0x10


@given(st.integers(0, (1 << 64) - 1))
def test_any_descriptor_becomes_a_segment(descriptor: int):
    fields = segment_fields(boot_state.segment(8, descriptor))
    assert fields["limit"] <= 0xFFFF_FFFF
    assert fields["base"] <= 0xFFFF_FFFF
    assert fields["present"] + fields["unusable"] == 1


def test_registers():
    registers = dict(zip(abi.REGS_NAMES, abi.REGS.unpack(boot_state.boot_regs(BOOT)), strict=True))
    given_ones = {"rip": 0x100_0200, "rsp": 0x8FF0, "rbp": 0x8FF0, "rsi": 0x7000, "rbx": 0x6000, "rflags": 2}
    assert registers == dict.fromkeys(abi.REGS_NAMES, 0) | given_ones


def test_special_registers_keep_what_the_protocol_does_not_name():
    current = bytes(range(256)) + bytes(range(56))
    sregs = boot_state.boot_sregs(current, BOOT)
    assert len(sregs) == abi.SREGS_SIZE
    assert segment_fields(sregs[abi.SREGS_CS : abi.SREGS_CS + 24])["selector"] == 8
    assert segment_fields(sregs[abi.SREGS_SS : abi.SREGS_SS + 24])["selector"] == 16
    assert segment_fields(sregs[abi.SREGS_TR : abi.SREGS_TR + 24])["selector"] == 24
    assert struct.unpack_from("<QH", sregs, abi.SREGS_GDT) == (0x500, 31)
    assert struct.unpack_from("<QH", sregs, abi.SREGS_IDT) == (0x520, 7)
    cr0, cr2, cr3, cr4, cr8, efer = struct.unpack_from("<6Q", sregs, abi.SREGS_CR0)
    assert (cr0, cr3, cr4, efer) == (0x8000_0011, 0x9000, 0x20, 0x500)
    kept = struct.unpack_from("<6Q", current, abi.SREGS_CR0)
    assert (cr2, cr8) == (kept[1], kept[4])
    for first, last in ((abi.SREGS_LDT, abi.SREGS_GDT), (abi.SREGS_APIC_BASE, abi.SREGS_SIZE)):
        assert sregs[first:last] == current[first:last]


def test_fpu_and_lapic():
    fpu = boot_state.boot_fpu()
    assert struct.unpack_from("<H", fpu, 128) == (0x37F,)
    assert struct.unpack_from("<I", fpu, 408) == (0x1F80,)
    before = bytes([0xFF]) * abi.LAPIC_SIZE
    after = boot_state.boot_lapic(before)
    assert struct.unpack_from("<I", after, 0x350)[0] >> 8 & 7 == 7
    assert struct.unpack_from("<I", after, 0x360)[0] >> 8 & 7 == 4
    changed = [position for position in range(abi.LAPIC_SIZE) if before[position] != after[position]]
    assert changed == [0x361]


def test_state_msrs_end_with_the_deadline():
    indices = msr.state_indices([0x10, 0x6E0, 0x2FF, 0x174])
    assert indices[:3] == [0x10, 0x2FF, 0x174]
    assert indices[-1] == 0x6E0
    assert len(set(indices)) == len(indices)
    assert set(range(0x200, 0x210)) < set(indices)
