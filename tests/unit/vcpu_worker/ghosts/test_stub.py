"""The stub: its bytes are what the assembler makes of stub.S, and a ghost's registers lead into it."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from vcpu_worker.ghosts import stub
from vcpu_worker.kvm import abi

SOURCE = Path(stub.__file__).with_name("stub.S")


def test_the_table_is_what_the_assembler_makes_of_the_source(tmp_path):
    made, binary = tmp_path / "stub.o", tmp_path / "stub.bin"
    subprocess.run(["as", "--32", "--fatal-warnings", "-o", made, SOURCE], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", made, binary], check=True)
    assembled = binary.read_bytes()
    assert len(assembled) == stub.CODE_SIZE
    assert stub.image() == assembled


@pytest.mark.parametrize("ghost", [0, 1, 31])
def test_registers(ghost):
    regs = dict(zip(abi.REGS_NAMES, abi.REGS.unpack(stub.regs(ghost)), strict=True))
    assert regs["rbx"] == stub.PORT + ghost
    assert stub.STACKS < regs["rsp"] == regs["rbp"] <= stub.STACKS + stub.STACKS_SIZE
    offset = regs["rip"] - stub.BASE
    assert stub.image()[offset : offset + 6] == bytes.fromhex("89ecfbf4ebfa")  # MOV ESP, EBP; STI; HLT; JMP
    sregs = stub.sregs(b"\xff" * abi.SREGS_SIZE, ghost)
    assert stub.runs_stub(stub.regs(ghost), sregs)
    assert not stub.runs_stub(stub.regs(ghost), bytes(abi.SREGS_SIZE))
    (base,) = struct.unpack_from("<Q", sregs, abi.SREGS_APIC_BASE)
    assert base == 0xFEE0_0C00 | (0x100 if ghost == 0 else 0)
    assert not any(sregs[abi.SREGS_APIC_BASE + 8 :])


def at(ghost: int, **changes: int) -> bytes:
    values = dict(zip(abi.REGS_NAMES, abi.REGS.unpack(stub.regs(ghost)), strict=True)) | changes
    return abi.REGS.pack(*(values[name] for name in abi.REGS_NAMES))


def instructions(binary: Path, start: int, stop: int) -> set[int]:
    """Offsets of the instructions in a part of the stub, as the disassembler finds them."""
    part = [f"--start-address={start}", f"--stop-address={stop}"]
    command = ["objdump", "-D", "-w", "-b", "binary", "-m", "i386", *part, str(binary)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(line.partition(":")[0], 16) for line in listing.splitlines() if ":\t" in line}


def test_a_ghost_is_sound_at_the_instructions_of_the_stub_and_nowhere_else(tmp_path):
    sregs = stub.sregs(bytes(abi.SREGS_SIZE), 3)
    offsets = range(stub.CODE_SIZE)
    sound = {offset for offset in offsets if stub.is_sound(at(3, rip=stub.BASE + offset), sregs, 3)}
    binary = tmp_path / "stub.bin"
    binary.write_bytes(stub.image())
    code = instructions(binary, 0x1800, 0x181B) | instructions(binary, 0x1840, 0x1856)
    for vector in range(256):
        entry = 0x1000 + 8 * vector
        code |= instructions(binary, entry, entry + 7) if vector % 64 == 0 else {entry, entry + 2}
    assert sound == code
    idle = abi.REGS.unpack(stub.regs(3))[abi.REGS_NAMES.index("rip")]
    assert stub.is_sound(at(3, rip=idle), sregs, 3)
    assert not stub.is_sound(at(3, rbx=stub.PORT + 2), sregs, 3)
    assert not stub.is_sound(at(3, rbp=stub.STACKS), sregs, 3)
    assert not stub.is_sound(at(3), bytes(abi.SREGS_SIZE), 3)
    assert not stub.is_sound(at(3, rip=0x100000), sregs, 3)


def test_a_ghost_forwards_in_its_handlers_and_nowhere_else():
    """Where KVM needs no exit for the end of an interrupt, it has ended before it is passed on."""
    offsets = [offset for offset in stub._INSTRUCTIONS if not stub.is_forwarding(at(3, rip=stub.BASE + offset))]
    assert [stub.image()[offset] for offset in sorted(offsets)] == [0x89, 0xFB, 0xF4, 0xEB]  # MOV, STI, HLT, JMP


def test_a_ghost_starts_at_the_beginning_of_a_page_in_real_mode():
    real_mode = bytes(abi.SREGS_SIZE)
    assert stub.is_starting(at(1, rip=0), real_mode)
    assert not stub.is_starting(at(1, rip=2), real_mode)
    assert not stub.is_starting(at(1, rip=0), stub.sregs(real_mode, 1))
