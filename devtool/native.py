"""The optional C extension: built where a C compiler is, again when its source, compiler or interpreter changes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from base import native_loops
from devtool.project import ROOT, say

SOURCE = ROOT / "virtio" / "block" / "_loops.c"
FLAGS = (
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-plt",
    "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-Wl,-z,relro,-z,now,-z,noexecstack",
)  # fmt: skip


def compiler() -> str | None:
    """Return the C compiler of this machine."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compile_loops(target: Path, flags: Sequence[str] = FLAGS) -> str:
    """Compile the extension; return what the compiler says if it fails. There is a compiler."""
    cc = compiler()
    assert cc is not None
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    command = [cc, *flags, "-I", sysconfig.get_path("include"), str(SOURCE), "-o", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        return done.stderr or f"{cc} ended with status {done.returncode}"
    fresh.replace(target)
    return ""


def build() -> None:
    """Bring the extension up to date; without a compiler there is none, and Python serves."""
    target = Path(native_loops.PATH)
    stamp = target.with_suffix(".stamp")
    cc = compiler()
    digest = hashlib.sha256(f"{cc}\n{FLAGS}\n{sys.version}\n".encode() + SOURCE.read_bytes()).hexdigest()
    if target.is_file() and stamp.is_file() and stamp.read_text() == digest:
        return
    target.unlink(missing_ok=True)
    if cc is None:
        say("no C compiler: block devices are served by Python alone (docs/adr/block-loop-in-c.md)")
        return
    if error := compile_loops(target):
        sys.stderr.write(error)
        say("warning: the C extension does not compile; block devices are served by Python alone")
        return
    stamp.write_text(digest)
