"""What a cold start loads: nothing heavy beyond what the control plane's own libraries bring along.

Numbers in milliseconds are the startup benchmark's business; this test finds the import that makes it slow.
"""

from __future__ import annotations

import subprocess

import pytest

from devtool.project import LAUNCHERS, PYTHON, ROOT

#: Every one of them was measured at a millisecond or more, or drags a family of others in.
HEAVY = {
    "argparse", "array", "ast", "asyncio", "bisect", "collections", "concurrent", "ctypes.util", "dataclasses",
    "difflib", "email", "gettext", "heapq", "html",
    "http", "importlib.metadata", "importlib.resources", "inspect", "ipaddress", "json", "locale", "logging", "lzma",
    "bz2", "multiprocessing", "pathlib", "pprint", "pyseccomp", "seccomp", "shutil", "subprocess", "tempfile",
    "tokenize", "unittest", "urllib", "uuid", "xml", "zipfile",
}  # fmt: skip
LIBRARIES = "from base import lean_msgpack, lean_zmq; lean_zmq.install(); lean_msgpack.install()"
ENTRIES = ("vcpu_worker.main", "vmm.main", "jailer.main", "jailer.firecracker")


def loaded_by(statement: str) -> set[str]:
    """Return the modules that are loaded after a statement, in an interpreter started as the launchers do it."""
    paths = (LAUNCHERS / "jailer").read_text().split("sys.path[:0] = ")[1].partition("\n")[0]
    code = f"import sys\nsys.path[:0] = {paths}\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([PYTHON, "-IS", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_heavy_is_loaded(entry):
    if not (ROOT / f"{entry.replace('.', '/')}.py").is_file():
        pytest.fail(f"{entry} does not exist")
    unneeded = (loaded_by(f"{LIBRARIES}; import {entry}") & HEAVY) - loaded_by(LIBRARIES)
    assert not unneeded


@pytest.mark.parametrize("option", ["--version", "--help"])
@pytest.mark.parametrize("program", ["firecracker", "jailer"])
def test_asking_for_help_loads_no_control_plane(program, option):
    command = [PYTHON, "-IS", "-X", "importtime", LAUNCHERS / program, option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "zmq" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
