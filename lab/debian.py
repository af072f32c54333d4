"""Debian's kernel packages: fetched, unpacked and cached. Nothing is installed on the host."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from devtool.process import run_step
from devtool.project import DevError, cache_directory, say

BUSYBOX = Path("/bin/busybox")


class Kernel(NamedTuple):
    """An unpacked kernel package in the cache."""

    package: str  #: name and version of the package, unique
    release: str  #: as `uname -r` shows it
    vmlinuz: Path
    modules: Path  #: the folder lib/modules/RELEASE, with modules.dep


@contextmanager
def cache_lock() -> Iterator[Path]:
    """Hold the cache for writing; yields its folder. Readers need no lock: entries appear complete, by rename."""
    directory = cache_directory()
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield directory
    finally:
        os.close(descriptor)


def ensure_kernel(metapackage: str) -> Kernel:
    """Return the newest cached kernel of `metapackage` (linux-image-amd64, …); fetch it if there is none.

    A cached kernel is used without asking the network for a newer one; to move on, delete it from the cache.
    Raises DevError if the package cannot be had.
    """
    kernels = cache_directory() / "kernels" / metapackage
    found = _cached(kernels)
    if found is None:
        with cache_lock():
            found = _cached(kernels)  # another process may have been quicker
            if found is None:
                _fetch(metapackage, kernels)
                found = _cached(kernels)
    if found is None:
        raise DevError(f"{metapackage}: the unpacked package holds no kernel; delete {kernels} and try again")
    return found


def _cached(kernels: Path) -> Kernel | None:
    """Return the kernel that was unpacked last."""
    unpacked = [path for path in kernels.glob("*") if not path.name.startswith(".")] if kernels.is_dir() else []
    for directory in sorted(unpacked, key=lambda path: path.stat().st_mtime, reverse=True):
        for vmlinuz in (directory / "boot").glob("vmlinuz-*"):
            release = vmlinuz.name.removeprefix("vmlinuz-")
            return Kernel(directory.name, release, vmlinuz, directory / "lib" / "modules" / release)
    return None


def _fetch(metapackage: str, kernels: Path) -> None:
    """Download, unpack, index the modules, and put the result in place under its package's name."""
    package = _resolve(metapackage)
    kernels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=kernels) as scratch:
        advice = "Is a Debian mirror reachable?"
        download = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package]
        run_step(f"downloading Debian's {package}", download, cwd=Path(scratch), advice=advice)
        archive = next(Path(scratch).glob("*.deb"))
        unpacked = Path(scratch) / "unpacked"
        run_step("unpacking it", ["dpkg-deb", "-x", archive, unpacked])
        release = next((unpacked / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
        run_step("indexing its modules", ["/sbin/depmod", "--basedir", unpacked, release])
        target = kernels / archive.name.removesuffix(".deb")
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)


def _resolve(metapackage: str) -> str:
    """Return the name of the package with the kernel that `metapackage` stands for."""
    name = _dependency(metapackage)
    if name is None:
        say("the package lists are missing: refreshing them")
        as_root = [] if os.geteuid() == 0 else ["sudo"]
        run_step("apt-get update", [*as_root, "apt-get", "-q", "update"], advice="Is a Debian mirror reachable?")
        name = _dependency(metapackage)
    if name is None:
        raise DevError(f"Debian's package lists know no {metapackage}; this tool needs Debian 12 on x86-64")
    return name


def _dependency(metapackage: str) -> str | None:
    command = ["apt-cache", "depends", "--important", metapackage]
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    for line in shown.splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    return None


def place(path: Path, content: bytes) -> None:
    """Write a cache entry so that it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(path)


def module_order(kernel: Kernel, names: Sequence[str]) -> list[Path]:
    """Return the files of the named modules and of what they need, in load order; built-in ones are left out.

    Raises DevError if the kernel has no such module.
    """
    depends: dict[str, list[str]] = {}
    files: dict[str, str] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        file, _, needs = line.partition(":")
        depends[file] = needs.split()
        files[_module_name(file)] = file
    builtin = {_module_name(line) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    order: list[str] = []

    def add(file: str) -> None:
        for needed in reversed(depends[file]):  # modules.dep lists the deepest last
            add(needed)
        if file not in order:
            order.append(file)

    for name in names:
        wanted = name.replace("-", "_")
        if wanted in files:
            add(files[wanted])
        elif wanted not in builtin:
            raise DevError(f"kernel {kernel.release} has no module {name}")
    return [kernel.modules / file for file in order]


def _module_name(file: str) -> str:
    """Return a module's name from its file: kernel/drivers/block/virtio_blk.ko → virtio_blk."""
    return file.rpartition("/")[2].partition(".")[0].replace("-", "_")
