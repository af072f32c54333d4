"""What a jailed microVM leaves behind, and how a test takes it away."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

from tests.harness.jail import JAILER, JailedMicrovm, id_of, wait_for


def janitors(base: Path) -> list[int]:
    """Return the janitors of jails below a base directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            named = (process / "comm").read_text() == "cellblock-clean\n"
            if named and str(base).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def remove_shared_parents(base: Path) -> None:
    """Remove the directories that several microVMs may share, and that a test made itself or --purge leaves."""
    cgroups = Path("/sys/fs/cgroup")
    wait_for(lambda: not list(cgroups.glob(f"*/firecracker/{id_of(base)}")), "the cgroups to be removed")
    if (base / "firecracker").exists():
        (base / "firecracker").rmdir()
    for directory in cgroups.glob("*/firecracker"):
        with suppress(OSError):  # somebody else's microVM is in it, or somebody else removes it
            directory.rmdir()


def after_the_janitor(jailed: JailedMicrovm) -> None:
    """Wait for the janitor, if there is one; purge what it was not told of because the jailer died too early."""
    base = jailed.base
    wait_for(lambda: not janitors(base), "the janitor")
    subprocess.run([JAILER, "--purge", jailed.id, "--chroot-base-dir", base], check=True, capture_output=True)
    remove_shared_parents(base)
