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
