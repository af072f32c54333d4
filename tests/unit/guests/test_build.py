"""The builder of the tiny guests, checked with an independent ELF reader."""

from __future__ import annotations

import subprocess

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from devtool.project import DevError
from tests.guests import build as builder

SOURCE = """
    .section .note.pvh, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long start
    .text
    .code32
    .globl start
    nop
start:
    mov $value, %eax
    mov $area, %edi
    hlt
    .bss
area: .skip 8192
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "FOLDER", tmp_path)
    monkeypatch.setenv("CELLBLOCK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.S").write_text(SOURCE)
    return tmp_path


def test_elf_with_pvh_note(folder):
    with builder.build("tiny", {"value": 0x1234}).open("rb") as file:
        elf = ELFFile(file)
        assert elf.elfclass == 64
        assert elf["e_machine"] == "EM_X86_64"
        load, note = elf.iter_segments()
        assert load["p_paddr"] == builder.LOAD_ADDRESS
        assert load["p_memsz"] - load["p_filesz"] >= 8192
        assert isinstance(note, NoteSegment)
        (pvh,) = note.iter_notes()
        assert f"{pvh['n_name']} {pvh['n_type']}" == "Xen 18"
        entry = int.from_bytes(pvh["n_descdata"], "little")
        assert entry == elf["e_entry"] == builder.LOAD_ADDRESS + 1
        assert load.data()[1:6] == b"\xb8\x34\x12\0\0"


def test_cached_by_content(folder):
    first = builder.build("tiny", {"value": 1})
    stamp = first.stat().st_mtime_ns
    assert builder.build("tiny", {"value": 1}) == first
    assert first.stat().st_mtime_ns == stamp
    assert builder.build("tiny", {"value": 2}) != first
    (folder / "tiny.S").write_text(SOURCE + "nop\n")
    assert builder.build("tiny", {"value": 1}) != first
    assert not list(first.parent.glob(".new-*"))


def test_errors_tell_the_assemblers_word(folder):
    (folder / "bad.S").write_text("start: bogus %eax\n")
    with pytest.raises(DevError, match="bogus"):
        builder.build("bad")
    with pytest.raises(DevError, match="there is no guest nothing; there are: bad, tiny"):
        builder.build("nothing")


@pytest.mark.parametrize("name", builder.names())
def test_every_guest_builds(name):
    assert builder.build(name).read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", builder.program_names())
def test_every_program_is_static(name):
    with builder.build_program(name).open("rb") as file:
        assert not {segment["p_type"] for segment in ELFFile(file).iter_segments()} & {"PT_INTERP", "PT_DYNAMIC"}


def test_programs_are_cached_by_content(folder):
    (folder / "small.c").write_text("int main(void) { return 7; }\n")
    first = builder.build_program("small")
    assert subprocess.run([first], check=False).returncode == 7
    assert builder.build_program("small") == first
    (folder / "small.c").write_text("int main(void) { return x; }\n")
    with pytest.raises(DevError, match="undeclared"):
        builder.build_program("small")
    with pytest.raises(DevError, match="there is no program nothing; there are: small"):
        builder.build_program("nothing")
