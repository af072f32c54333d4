"""Builds the tiny guests: NAME.S beside this file → an ELF64 kernel, by binutils, cached by content; and the programs
that Linux guests run: NAME.c → a static executable, by gcc.

Conventions of the sources: the entry symbol is `_start` or `start` (neither: the beginning of .text); a PVH entry is
announced by a note in section `.note.pvh` (name "Xen", type 18: XEN_ELFNOTE_PHYS32_ENTRY); text, data and bss are
loaded at 1 MiB, writable and executable.
Sources may `.include` *.inc files of this folder and take symbols from `defines`.

`python -m tests.guests.build [NAME…]` builds guests and programs (all, if none is named) and prints their paths.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from devtool.project import DevError, cache_directory

FOLDER = Path(__file__).resolve().parent
LOAD_ADDRESS = 0x100000
_LINKER_SCRIPT = """
ENTRY(_start)
PHDRS {{ load PT_LOAD FLAGS(7); note PT_NOTE FLAGS(4); }}
SECTIONS {{
    . = {address:#x};
    .text : {{ *(.text .text.*) }} :load
    .rodata : {{ *(.rodata .rodata.*) }} :load
    .note : {{ KEEP(*(.note.pvh)) }} :load :note
    .data : {{ *(.data .data.*) }} :load
    .bss : {{ *(.bss .bss.* COMMON) }} :load
    PROVIDE(_start = DEFINED(start) ? start : ADDR(.text));
    /DISCARD/ : {{ *(.note.gnu.property .comment .eh_frame) }}
}}
"""


def names() -> list[str]:
    """Return the names of all guests."""
    return sorted(path.stem for path in FOLDER.glob("*.S"))


def build(name: str, defines: Mapping[str, int] | None = None, *, address: int = LOAD_ADDRESS) -> Path:
    """Return the guest's ELF file; assembles and links it if this source was not built before.

    `defines` sets absolute symbols of the source. Raises DevError with the assembler's or linker's message.
    """
    source = FOLDER / f"{name}.S"
    if not source.is_file():
        raise DevError(f"there is no guest {name}; there are: {', '.join(names())}")
    symbols = sorted((defines or {}).items())
    digest = hashlib.sha256(f"{symbols} {address}".encode())
    for file in (Path(__file__), source, *sorted(FOLDER.glob("*.inc"))):
        digest.update(file.read_bytes())
    target = cache_directory() / "tiny-guests" / f"{name}-{digest.hexdigest()[:24]}.elf"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
        script, object_file, linked = (Path(scratch) / part for part in ("script", "object", "linked"))
        script.write_text(_LINKER_SCRIPT.format(address=address))
        options = [f"--defsym={symbol}={value}" for symbol, value in symbols]
        _tool(["as", "--64", "--fatal-warnings", "-I", FOLDER, *options, "-o", object_file, source])
        # --no-warn-rwx-segments: a guest of one page has one segment for all it has.
        _tool(["ld", "-nostdlib", "-static", "--build-id=none", "--no-warn-rwx-segments", "-z", "max-page-size=4096",
               "-T", script, "-o", linked, object_file])  # fmt: skip
        os.replace(linked, target)  # complete or not at all, also with several builders at once
    return target


def program_names() -> list[str]:
    """Return the names of all programs for Linux guests."""
    return sorted(path.stem for path in FOLDER.glob("*.c"))


def build_program(name: str) -> Path:
    """Return the static executable of a program for Linux guests; compiles it if this source was not built before.

    Raises DevError with the compiler's message.
    """
    source = FOLDER / f"{name}.c"
    if not source.is_file():
        raise DevError(f"there is no program {name}; there are: {', '.join(program_names())}")
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in (source, *sorted(FOLDER.glob("*.h"))):
        digest.update(file.read_bytes())
    target = cache_directory() / "guest-programs" / f"{name}-{digest.hexdigest()[:24]}"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
        made = Path(scratch) / name
        options = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-s"]
        _tool(["gcc", *options, "-o", made, source])
        os.replace(made, target)
    return target


def _tool(command: list[str | Path]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise DevError(f"{command[0]} failed:\n{done.stdout}")


def main() -> int:
    """Build and print paths."""
    try:
        for name in sys.argv[1:] or [*names(), *program_names()]:
            print(build_program(name) if name in program_names() else build(name))
    except DevError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
