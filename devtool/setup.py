"""./dev setup: Debian packages, the virtual environment with locked versions, the drop-in launchers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from devtool import native
from devtool.process import run_step
from devtool.project import LAUNCHERS, PYTHON, ROOT, VENV, DevError, say

#: What the product, its tests and its lab need from Debian, and why.
DEBIAN_PACKAGES = (
    "python3", "python3-venv", "python3-dev",  # the interpreter; headers for python-prctl
    "gcc", "libc6-dev", "libcap-dev", "libseccomp2",  # python-prctl is built from source
    "binutils", "acpica-tools", "strace", "curl",  # tests: assembled guests, oracles, clients
    "qemu-system-x86", "busybox-static", "cpio", "xz-utils", "zstd", "lz4", "kmod",  # lab, guest images
    "mmdebstrap", "e2fsprogs",  # guests' disks
    "mount", "util-linux", "iproute2", "procps", "git", "ca-certificates",
)  # fmt: skip
#: Programs of which any version will do (tests: clients in Go and in JavaScript), and the package with each, which is
#: installed only where there is no such program: golang-go is 81 MB of download and 450 on disk, nodejs 12 and 60.
DEBIAN_PROGRAMS = {"go": "golang-go", "node": "nodejs"}
LOCKS = (ROOT / "requirements-build.lock", ROOT / "requirements.lock")
#: Launcher → module with its `main(argv)`. `cpu-template` is `cellblock cpu-template` under the name that it had;
#: clients know the last two by Firecracker's names for them.
PROGRAMS = {
    "firecracker": "jailer.firecracker",
    "jailer": "jailer.main",
    "cellblock": "cellblock.main",
    "cpu-template": "cellblock.cpu_template.main",
    "cpu-template-helper": "cellblock.cpu_template.main",
    "seccompiler-bin": "cellblock.seccompiler.main",
}
#: The jailer recognises our programs by this text within the first KiB (docs/jailer.md).
LAUNCHER_MARKER = "cellblock-launcher"
_LONGEST_INTERPRETER_LINE = 120


def set_up() -> None:
    """Bring the checkout to the state in which everything runs. Quick when nothing is missing."""
    checkout = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(checkout, fcntl.LOCK_EX)  # two calls at once would undo each other's work
        install_debian_packages(needed_debian_packages())
        make_virtual_environment()
        write_launchers()
        native.build()
        precompile()
    finally:
        os.close(checkout)


def needed_debian_packages() -> list[str]:
    """Return the packages that this machine is to have."""
    programs = [package for program, package in DEBIAN_PROGRAMS.items() if shutil.which(program) is None]
    return [*DEBIAN_PACKAGES, *programs]


def missing_debian_packages(packages: Sequence[str]) -> list[str]:
    """Return those of `packages` that dpkg does not know as installed."""
    query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\\n", *packages]
    shown = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    installed = {line.partition(" ")[0] for line in shown.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def install_debian_packages(packages: Sequence[str]) -> None:
    """Install those of `packages` that are missing; refresh the package lists only if that fails without."""
    missing = missing_debian_packages(packages)
    if not missing:
        return
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    if as_root and shutil.which("sudo") is None:
        raise DevError(f"these Debian packages are missing: {' '.join(missing)}. Install them as root with apt-get.")
    apt = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
    install = [*apt, "install", "--no-install-recommends", *missing]
    what = f"installing {len(missing)} Debian packages ({' '.join(missing)})"
    if Path("/var/lib/apt/lists").is_dir() and any(Path("/var/lib/apt/lists").glob("*Packages*")):
        try:
            run_step(what, install)
        except DevError:
            say("the package lists may be old: refreshing them and trying again")
        else:
            return
    run_step("refreshing the package lists", [*apt, "update"], advice="Is a Debian mirror reachable?")
    run_step(what, install, advice="Install them by hand with apt-get and run ./dev setup again.")


def make_virtual_environment() -> None:
    """Make .venv with the locked versions; a stamp keyed by interpreter and locks makes the next call instant."""
    digest = hashlib.sha256(f"{sys.version}\n{VENV}\n".encode())
    for lock in LOCKS:
        digest.update(lock.read_bytes())
    stamp = VENV / "cellblock-stamp"
    if stamp.is_file() and stamp.read_text() == digest.hexdigest() and PYTHON.exists():
        return
    stamp.unlink(missing_ok=True)
    run_step("making the virtual environment .venv", [sys.executable, "-m", "venv", "--clear", VENV])
    for lock, what in zip(LOCKS, ("build tools", "locked Python packages"), strict=True):
        install = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-build-isolation", "--require-hashes"]
        run_step(f"installing {what}", [*install, "-r", str(lock)], advice="Is a Python package index reachable?")
    stamp.write_text(digest.hexdigest())


def launcher_text(module: str, program: str) -> str:
    """Return the text of a drop-in program that calls `module.main(argv)`.

    The interpreter runs isolated and without site: a cold start spends a quarter less time before our first line.
    """
    interpreter = f"#!{PYTHON} -IS\n"
    if len(interpreter) > _LONGEST_INTERPRETER_LINE or any(character.isspace() for character in str(PYTHON)):
        # The kernel cuts long interpreter lines and splits them at blanks: go through sh instead.
        interpreter = f"#!/bin/sh\n'''exec' {shlex.quote(str(PYTHON))} -IS \"$0\" \"$@\"\n' '''\n"
    site_packages = next((VENV / "lib").glob("python3.*/site-packages"))
    return (
        f"{interpreter}"
        f"# {LAUNCHER_MARKER}: {program} of Cellblock. Written by ./dev setup.\n"
        "import sys\n"
        f"sys.path[:0] = {[str(ROOT), str(site_packages)]!r}\n"
        f"from {module} import main\n"
        "sys.exit(main(sys.argv))\n"
    )


def write_launchers() -> None:
    """Write the drop-in programs into the virtual environment's bin folder."""
    for program, module in PROGRAMS.items():
        path = LAUNCHERS / program
        text = launcher_text(module, program)
        if path.is_file() and path.read_text() == text and os.access(path, os.X_OK):
            continue
        fresh = path.with_name(f".{program}.{os.getpid()}")
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.replace(path)


def precompile() -> None:
    """Compile the product's byte code and seccomp policies ahead of time: a cold start should do neither."""
    # Without columns of positions: half of a line table, and no reader of a cell's errors misses them.
    subprocess.run([PYTHON, "-X", "no_debug_ranges", "-m", "devtool.bytecode"], cwd=ROOT, check=False)
    if (ROOT / "jailer/seccomp/compile.py").is_file():
        command = [str(PYTHON), "-m", "jailer.seccomp.compile"]
        compiled = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        if compiled.returncode != 0:
            sys.stderr.write(compiled.stderr)
            # Not the end of everything: the lab and the linters work without, and the tests will say it.
            say("warning: the seccomp policies do not compile (python -m jailer.seccomp.compile)")
