"""The QEMU that the lab runs in: Debian's own, from its backports, unpacked into the cache. Nothing is installed.

Debian 12's own, 7.2, emulates several processors at once with faults that a lab meets sooner or later (docs/lab.md).
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from devtool.process import run_step
from devtool.project import DevError, cache_directory, say
from lab.debian import cache_lock

SUITE = "bookworm-backports"
PACKAGES = ("qemu-system-x86", "qemu-system-data", "qemu-system-common", "seabios")
#: The one that is installed: the other one's libraries are its, and some of its data.
INSTALLED = "qemu-system-x86_64"
_INSTALLED_DATA = Path("/usr/share/qemu")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEFAULT_MIRROR = "http://deb.debian.org/debian/"
_PROGRAM = Path("usr/bin/qemu-system-x86_64")
_DATA = (Path("usr/share/qemu"), Path("usr/share/seabios"))


def ensure() -> list[str]:
    """Return how QEMU's command line begins; fetches QEMU if it is not in the cache.

    Where the backports cannot be had it is the installed one, and that is said.
    """
    releases = cache_directory() / "qemu"
    found = _cached(releases)
    if found is None:
        with cache_lock():
            found = _cached(releases)  # another process may have been quicker
            if found is None:
                try:
                    _fetch(releases)
                except DevError as error:
                    say(f"{error} The lab runs in the installed QEMU instead, in which its machine may crash.")
                found = _cached(releases)
    if found is None:
        return [INSTALLED]
    folders = (*(found / folder for folder in _DATA), _INSTALLED_DATA)
    return [str(found / _PROGRAM), *(word for folder in folders for word in ("-L", str(folder)))]


def _cached(releases: Path) -> Path | None:
    """Return the release that was unpacked last."""
    unpacked = [path for path in releases.glob("*") if not path.name.startswith(".")] if releases.is_dir() else []
    return max(unpacked, key=lambda path: path.stat().st_mtime, default=None)


def _fetch(releases: Path) -> None:
    """Download, unpack, try, and put the result in place under the package's name. Raises DevError."""
    releases.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=releases) as name:
        scratch = Path(name)
        (scratch / "lists").mkdir()
        sources = scratch / "backports.list"
        sources.write_text(f"deb [signed-by={_KEYRING}] {_mirror()} {SUITE} main\n")
        # fmt: off
        apt = [
            "apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", f"Dir::Etc::SourceList={sources}",
            "-o", "Dir::Etc::SourceParts=/dev/null", "-o", f"Dir::State::Lists={scratch / 'lists'}",
            "-o", f"Dir::Cache={scratch}", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20",
        ]
        # fmt: on
        advice = f"Is a Debian mirror with {SUITE} reachable?"
        run_step(f"reading the package lists of {SUITE}", [*apt, "update"], cwd=scratch, advice=advice)
        run_step("downloading the lab's QEMU", [*apt, "-t", SUITE, "download", *PACKAGES], cwd=scratch, advice=advice)
        unpacked = scratch / "unpacked"
        archives = sorted(scratch.glob("*.deb"))
        for archive in archives:
            run_step(f"unpacking {archive.name}", ["dpkg-deb", "-x", archive, unpacked])
        run_step("trying it", [unpacked / _PROGRAM, "--version"])
        package = next(each.stem for each in archives if each.name.startswith(f"{PACKAGES[0]}_"))
        target = releases / package
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)


def _mirror() -> str:
    """Return the mirror that this host's packages come from."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: bookworm"]
    shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    return next(iter(shown.split()), _DEFAULT_MIRROR)
