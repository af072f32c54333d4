"""A guest's disk: an ext4 root file system of Debian packages, cached by what goes into it.

`./dev image` (or `python -m lab.guest_disk`) makes what is missing and prints where it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from devtool.process import run_step
from devtool.project import DevError, cache_directory, say
from lab import guest_agent
from lab.debian import cache_lock

SUITE = "bookworm"
#: An init and what a machine needs for it, then what tests run.
#: usr-is-merged stands in for usrmerge, which would bring Perl; _MERGED_USR does what it asks for.
PACKAGES = (
    "usr-is-merged", "systemd-sysv", "udev", "openssh-server",
    "e2fsprogs", "fio", "iperf3", "socat", "iproute2", "procps",
)  # fmt: skip
#: There to be installed, or laid down once more: in /srv/packages. One program; dozens of files; thousands.
TO_INSTALL = ("hello", "e2fsprogs", "tzdata")
SIZE_MIB = 1024
#: Of no use without a reader, and a third of it all.
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_HERE = Path(__file__).resolve().parent
_MERGED_USR = "/usr/share/mmdebstrap/hooks/merged-usr"
_CHUNK = 1 << 20
_MIB = 1 << 20


class GuestDisk(NamedTuple):
    """A disk in the cache: do not write to it, nor boot from it but through a copy."""

    path: Path  #: raw ext4, sparse
    extents: tuple[tuple[int, int], ...]  #: offset and length in bytes of what is not zero
    sha256: str  #: of its contents
    packages: dict[str, str]  #: name → version

    def copy_to(self, target: Path) -> Path:
        """Write a sparse copy; return its path.

        By the list of what is not zero: a file system that knows no holes (9p) would read them all.
        """
        with self.path.open("rb") as source, target.open("wb") as output:
            output.truncate(self.path.stat().st_size)
            for offset, length in self.extents:
                _copy_range(source.fileno(), output.fileno(), offset, length)
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return target


def _copy_range(source: int, target: int, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        data = os.pread(source, min(_CHUNK, end - offset), offset)
        if not data:
            raise DevError("the guest's disk in the cache is cut short; delete the folder disks/ of the cache")
        os.pwrite(target, data, offset)
        offset += len(data)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ensure(packages: Sequence[str] = PACKAGES, size_mib: int = SIZE_MIB) -> GuestDisk:
    """Return the disk; makes it if no disk of these contents is in the cache (half a minute).

    What is cached stays as it is when Debian's packages change; to have newer ones, delete it.
    Raises DevError if the packages cannot be had or the file system cannot be made.
    """
    agent = guest_agent.build()
    digest = hashlib.sha256(f"{SUITE} {sorted(packages)} {TO_INSTALL} {_LEFT_OUT} {size_mib}\n".encode())
    for source in (_HERE / "guest_disk.sh", agent):
        digest.update(source.read_bytes())
    directory = cache_directory() / "disks" / digest.hexdigest()[:32]
    if not directory.is_dir():
        with cache_lock():
            if not directory.is_dir():  # another process may have been quicker
                _make(directory, agent, packages, size_mib)
    return _load(directory)


def _load(directory: Path) -> GuestDisk:
    record = json.loads((directory / "record.json").read_text())
    extents = tuple((offset, length) for offset, length in record["extents"])
    return GuestDisk(directory / "root.ext4", extents, record["sha256"], record["packages"])


def _make(directory: Path, agent: Path, packages: Sequence[str], size_mib: int) -> None:
    """Fill a root file system, put it into an image, and move both it and its record to their place."""
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=directory.parent))
    try:
        root, fresh = scratch / "root", scratch / "disk"
        fresh.mkdir()
        run_step(
            f"making a root file system of Debian {SUITE} packages ({' '.join(packages)})",
            [*as_root, *_mmdebstrap(root, agent, packages)],
            advice="Is a Debian mirror reachable? (mmdebstrap comes with ./dev setup.)",
        )
        image = fresh / "root.ext4"
        # Nothing is left for the guest's kernel to do to it later (lazy initialisation writes for minutes).
        mke2fs = ["mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-L", "cellblock-root"]
        run_step(
            f"putting it into an ext4 image of {size_mib} MiB",
            [*as_root, *mke2fs, "-d", root, image, f"{size_mib}M"],
            advice=f"Is there room? {shutil.disk_usage(scratch).free // _MIB} MiB are free in {scratch.parent}.",
        )
        if as_root:
            run_step("taking it over", ["sudo", "chown", str(os.getuid()), image])
        image.chmod(0o644)
        record = {"extents": list(_extents(image)), "sha256": digest_of(image), "packages": _versions(root)}
        (fresh / "record.json").write_text(json.dumps(record))
        fresh.rename(directory)
    finally:
        subprocess.run([*as_root, "rm", "-rf", "--one-file-system", str(scratch)], check=False)


def _mmdebstrap(root: Path, agent: Path, packages: Sequence[str]) -> list[str]:
    """Return the command that makes the folder `root`."""
    left_out = [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    hook = f'"{_HERE / "guest_disk.sh"}" "$1" "{agent}" {" ".join(TO_INSTALL)}'
    # fmt: off
    return [
        "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--hook-dir={_MERGED_USR}", *left_out,
        "--aptopt=APT::Install-Recommends \"false\"", f"--include={','.join(packages)}", f"--customize-hook=sh {hook}",
        SUITE, str(root), *_mirrors(),
    ]
    # fmt: on


def _mirrors() -> list[str]:
    """Return this machine's own Debian sources, as lines of sources.list; none: mmdebstrap's default.

    Where a Debian mirror stands in for the public one, that is known to apt alone.
    """
    wanted = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)"]
    command = [*wanted, "Created-By: Packages"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    lines: list[str] = []
    for line in shown.splitlines():
        address, release, component, origin = (line.split(" ") + [""] * 4)[:4]
        if origin == "Debian" and component == "main" and release.startswith(SUITE):
            lines.append(f"deb {address} {release} main")
    return lines if any(line.split(" ")[2] == SUITE for line in lines) else []


def _versions(root: Path) -> dict[str, str]:
    query = ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show"]
    shown = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(line.split("\t") for line in shown.splitlines())


def _extents(path: Path) -> Iterator[tuple[int, int]]:
    """Yield offset and length of every stretch that the file's own file system keeps."""
    with path.open("rb") as file:
        size, end = path.stat().st_size, 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing more
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end - start


def _allocated(extents: Iterable[tuple[int, int]]) -> int:
    return sum(length for _, length in extents)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="./dev image",
        description="Make the disk that test guests and the demo boot from: an ext4 root file system of Debian "
        "packages (systemd, sshd, fio, iperf3, socat, an agent that runs commands over the console). It is kept in the "
        "cache (docs/lab.md) by its contents; nothing is done when it is there. Prints NAME=VALUE lines.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--package", action="append", default=[], metavar="NAME", help="install this Debian package, too (repeatable)"
    )
    parser.add_argument("--size", type=int, default=SIZE_MIB, metavar="MIB", help="of the disk (default: %(default)s)")
    parser.add_argument("--copy-to", type=Path, metavar="FILE", help="write a sparse copy of one's own, to boot from")
    options = parser.parse_args(arguments)
    try:
        disk = ensure((*PACKAGES, *options.package), options.size)
        if options.copy_to is not None:
            disk.copy_to(options.copy_to)
    except (DevError, OSError) as error:
        say(f"error: {error}")
        return 1
    print(f"disk={options.copy_to or disk.path}")
    print(f"sha256={disk.sha256}")
    print(f"packages={len(disk.packages)}")
    print(f"allocated={_allocated(disk.extents) // _MIB} MiB of {disk.path.stat().st_size // _MIB} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
