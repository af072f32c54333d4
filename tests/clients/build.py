"""How the clients are started: NAME.go is compiled (offline, cached by content), NAME.mjs is run by node."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from devtool.project import DevError, cache_directory

FOLDER = Path(__file__).resolve().parent


def go_client(name: str) -> list[str]:
    """Return the command of a client in Go, which uses the standard library alone; compiles it if it is new.

    Raises DevError with the compiler's message.
    """
    source = FOLDER / f"{name}.go"
    digest = hashlib.sha256(Path(__file__).read_bytes() + source.read_bytes()).hexdigest()
    target = cache_directory() / "clients" / f"{name}-{digest[:24]}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
            made = Path(scratch) / name
            offline = {
                "CGO_ENABLED": "0", "GO111MODULE": "off", "GOFLAGS": "", "GOPROXY": "off", "GOTOOLCHAIN": "local",
                "GOCACHE": str(cache_directory() / "go-build"), "GOPATH": scratch,
            }  # fmt: skip
            _run([_program("go"), "build", "-o", made, source], os.environ | offline)
            os.replace(made, target)  # complete or not at all, also with several builders at once
    return [str(target)]


def node_client(name: str) -> list[str]:
    """Return the command of a client in JavaScript, which uses what comes with node alone."""
    return [_program("node"), "--no-warnings", str(FOLDER / f"{name}.mjs")]


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise DevError(f"{name} is missing: ./dev setup installs it")
    return found


def _run(command: list[str | Path], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise DevError(f"{command[0]} failed:\n{done.stdout}")
