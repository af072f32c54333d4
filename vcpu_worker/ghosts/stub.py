"""The stub's bytes (stub.S), where it lies in guest physical memory, and the registers that a ghost runs it with."""

from __future__ import annotations

import ctypes
import mmap
import struct

from vcpu_worker.cpu.boot_state import segment
from vcpu_worker.kvm import abi
from vcpu_worker.kvm.vm import KvmVm

#: Guest physical address: above the LAPICs' window, below the pages that KVM keeps for itself on Intel hosts.
BASE = 0xFEF0_0000
CODE_SIZE = 2 * mmap.PAGESIZE
STACKS = BASE + CODE_SIZE
STACKS_SIZE = mmap.PAGESIZE
#: A ghost's share of the page of stacks. The deepest it gets is an NMI in a handler: 32 bytes.
STACK_SIZE = 128
#: Ghost n tells of an interrupt by OUT to this port + n.
PORT = 0xE00
NMI_VECTOR = 2
#: Vectors below are exceptions: no interrupt has them.
FIRST_VECTOR = 16

CODE_SLOT = 256
STACKS_SLOT = 257

_IDT_OFFSET = 0x800
_ENTRIES_OFFSET = 0x1000
_SHARED_OFFSET = 0x1800
_IDLE_OFFSET = 0x1815
_NMI_OFFSET = 0x1840
_VECTOR_COUNT = 256
_GDT = (0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
_SHARED = bytes.fromhex("0fba75800089daee720b31c031d2b90b0800000f3089ecfbf4ebfa")
_NMI = bytes.fromhex("5052b00289daeef7442410000200005a5875c2c20800")
#: Where an instruction of the shared code, and of the NMI's, begins.
_SHARED_BOUNDARIES = (0, 5, 7, 8, 10, 12, 14, 19, 21, 23, 24, 25)
_NMI_BOUNDARIES = (0, 1, 2, 4, 6, 7, 15, 16, 17, 19)
_GATE = struct.Struct("<4H")
_ENTRY = struct.Struct("<BBBix")  # MOV AL, vector; JMP shared
_INTERRUPT_GATE = 0x8E00
_CODE_SELECTOR = 8
_DATA_SELECTOR = 16
_TSS_SELECTOR = 24
_BUSY_TSS = 11
_CR0 = 0x11  # PE, ET
_CR0_PE = 1
_APIC_BASE = 0xFEE0_0C00  # enabled, x2APIC
_APIC_BASE_BSP = 0x100
_RFLAGS = 2

#: MSR of the x2APIC's spurious interrupt register, and "enabled, vector 0xff".
X2APIC_SPURIOUS = abi.x2apic_msr(abi.APIC_SPIV)
SPURIOUS_ENABLED = 0x1FF
#: MSR_KVM_PV_EOI_EN (Linux, Documentation/virt/kvm/x86/msr.rst): address of a word, of which KVM sets bit 0 where the
#: end of an interrupt needs no exit; bit 0 of the MSR turns it on.
PV_EOI_MSR = 0x4B56_4D04
_PV_EOI_ENABLED = 1

assert _GATE.size == 8 and _ENTRY.size == 8
assert STACK_SIZE * 32 == STACKS_SIZE


def image() -> bytes:
    """Return the two pages of the code slot."""
    code = bytearray(CODE_SIZE)
    struct.pack_into("<3Q", code, 0, *_GDT)
    for vector in range(_VECTOR_COUNT):
        entry = _ENTRIES_OFFSET + vector * _ENTRY.size
        handler = BASE + (_NMI_OFFSET if vector == NMI_VECTOR else entry)
        gate = _IDT_OFFSET + vector * _GATE.size
        _GATE.pack_into(code, gate, handler & 0xFFFF, _CODE_SELECTOR, _INTERRUPT_GATE, handler >> 16)
        _ENTRY.pack_into(code, entry, 0xB0, vector, 0xE9, _SHARED_OFFSET - (entry + 7))
    code[_SHARED_OFFSET : _SHARED_OFFSET + len(_SHARED)] = _SHARED
    code[_NMI_OFFSET : _NMI_OFFSET + len(_NMI)] = _NMI
    return bytes(code)


class StubMemory:
    """The stub's memory of one worker. Private to it: a guest reaches no other process by writing to the stacks."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping = mmap.mmap(-1, CODE_SIZE + STACKS_SIZE, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        self._mapping[:CODE_SIZE] = image()

    def give_to(self, vm: KvmVm) -> None:
        """Make the two memory slots."""
        host = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        vm.set_memory_region(CODE_SLOT, BASE, CODE_SIZE, host, abi.MEM_READONLY)
        vm.set_memory_region(STACKS_SLOT, STACKS, STACKS_SIZE, host + CODE_SIZE)


def pv_eoi(ghost: int) -> int:
    """Return the value of PV_EOI_MSR: the word lies below the ghost's stack."""
    return STACKS + ghost * STACK_SIZE | _PV_EOI_ENABLED


def regs(ghost: int) -> bytes:
    """Return struct kvm_regs of a ghost that is about to halt."""
    stack = STACKS + (ghost + 1) * STACK_SIZE
    values = {"rbx": PORT + ghost, "rsp": stack, "rbp": stack, "rip": BASE + _IDLE_OFFSET, "rflags": _RFLAGS}
    return abi.REGS.pack(*(values.get(name, 0) for name in abi.REGS_NAMES))


def sregs(current: bytes, ghost: int) -> bytes:
    """Return struct kvm_sregs of a ghost, made from its present one."""
    made = bytearray(current)
    size = abi.SEGMENT_SIZE
    made[abi.SREGS_CS : abi.SREGS_CS + size] = segment(_CODE_SELECTOR, _GDT[1])
    for offset in (abi.SREGS_DS, abi.SREGS_ES, abi.SREGS_FS, abi.SREGS_GS, abi.SREGS_SS):
        made[offset : offset + size] = segment(_DATA_SELECTOR, _GDT[2])
    made[abi.SREGS_TR : abi.SREGS_TR + size] = abi.SEGMENT.pack(
        BASE, 0x67, _TSS_SELECTOR, _BUSY_TSS, 1, 0, 0, 0, 0, 0, 0, 0, 0
    )
    made[abi.SREGS_LDT : abi.SREGS_LDT + size] = abi.SEGMENT.pack(0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0)
    abi.DTABLE.pack_into(made, abi.SREGS_GDT, BASE, 8 * len(_GDT) - 1)
    abi.DTABLE.pack_into(made, abi.SREGS_IDT, BASE + _IDT_OFFSET, 8 * _VECTOR_COUNT - 1)
    apic_base = _APIC_BASE | (_APIC_BASE_BSP if ghost == 0 else 0)
    for offset, value in (
        (abi.SREGS_CR0, _CR0),
        (abi.SREGS_CR2, 0),
        (abi.SREGS_CR3, 0),
        (abi.SREGS_CR4, 0),
        (abi.SREGS_CR8, 0),
        (abi.SREGS_EFER, 0),
        (abi.SREGS_APIC_BASE, apic_base),
    ):
        made[offset : offset + 8] = value.to_bytes(8, "little")
    made[abi.SREGS_APIC_BASE + 8 :] = bytes(len(made) - abi.SREGS_APIC_BASE - 8)  # no interrupt is being delivered
    return bytes(made)


def runs_stub(regs_now: bytes, sregs_now: bytes) -> bool:
    """Does a ghost with these registers execute the stub?"""
    rip = int.from_bytes(regs_now[abi.REGS_RIP : abi.REGS_RIP + 8], "little")
    code = sregs_now[abi.SREGS_CS : abi.SREGS_CS + abi.SEGMENT_SIZE]
    return BASE <= rip < BASE + CODE_SIZE and code == segment(_CODE_SELECTOR, _GDT[1])


def _boundaries() -> frozenset[int]:
    """Return the offsets of all instructions of the stub."""
    entries = (_ENTRIES_OFFSET + vector * _ENTRY.size for vector in range(_VECTOR_COUNT))
    return frozenset(
        (
            *(entry + part for entry in entries for part in (0, 2)),
            *(_SHARED_OFFSET + offset for offset in _SHARED_BOUNDARIES),
            *(_NMI_OFFSET + offset for offset in _NMI_BOUNDARIES),
        )
    )


_INSTRUCTIONS = _boundaries()
_RIP, _RBX, _RBP = (abi.REGS_NAMES.index(name) for name in ("rip", "rbx", "rbp"))


def is_sound(regs_now: bytes, sregs_now: bytes, ghost: int) -> bool:
    """Is a ghost with these registers on its way to the stub's HLT?

    It is if it executes one of the stub's instructions, from its beginning, with its own port and stack: there is no
    loop in the stub but through HLT. Where it was led into the middle of an instruction, anything may follow.
    """
    if not runs_stub(regs_now, sregs_now):
        return False
    values = abi.REGS.unpack(regs_now)
    stack = STACKS + (ghost + 1) * STACK_SIZE
    return values[_RIP] - BASE in _INSTRUCTIONS and values[_RBX] == PORT + ghost and values[_RBP] == stack


def is_forwarding(regs_now: bytes) -> bool:
    """Is a sound ghost with these registers in a handler? Its LAPIC may have the interrupt no more, and nobody yet."""
    rip = int.from_bytes(regs_now[abi.REGS_RIP : abi.REGS_RIP + 8], "little")
    return not _IDLE_OFFSET <= rip - BASE < _NMI_OFFSET


def where(regs_now: bytes, sregs_now: bytes) -> str:
    """Return what the checks above look at, for people."""
    values = dict(zip(abi.REGS_NAMES, abi.REGS.unpack(regs_now), strict=True))
    code = sregs_now[abi.SREGS_CS : abi.SREGS_CS + abi.SEGMENT_SIZE]
    shown = " ".join(f"{name} {values[name]:#x}" for name in ("rip", "rflags", "rsp", "rbp", "rax", "rbx"))
    return f"{shown}, cs {code.hex()}, cr0 {_cr0(sregs_now):#x}"


def _cr0(sregs_now: bytes) -> int:
    return int.from_bytes(sregs_now[abi.SREGS_CR0 : abi.SREGS_CR0 + 8], "little")


def is_starting(regs_now: bytes, sregs_now: bytes) -> bool:
    """Is a ghost with these registers where a SIPI has led it, before the first instruction there?"""
    rip = int.from_bytes(regs_now[abi.REGS_RIP : abi.REGS_RIP + 8], "little")
    return rip == 0 and not _cr0(sregs_now) & _CR0_PE
