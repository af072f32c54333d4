"""Hostile block requests: every form of the device does the same, and none raises; the C one under sanitizers, too."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from devtool import native
from devtool.project import PYTHON, ROOT

FULL = 1_000_000
SANITIZERS = (
    "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-shared", "-fPIC",
)  # fmt: skip


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The extension, built with sanitizers, and the environment that an interpreter needs for it."""
    library = tmp_path_factory.mktemp("native") / "_loops.so"
    assert not native.compile_loops(library, SANITIZERS)
    preloaded = []
    cc = native.compiler()
    assert cc is not None
    for name in ("libasan.so", "libubsan.so"):
        command = [cc, f"-print-file-name={name}"]
        preloaded.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    # What the interpreter does not free at its end is not the extension's leak.
    return str(library), {**os.environ, "LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}


def run(module: str, seed: int, count: int, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    command = [str(PYTHON), "-m", f"tests.fuzz.{module}", str(seed), str(count), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, f"seed {seed}, count {count}:\n{done.stdout}\n{done.stderr}"
    outcomes: dict[str, Any] = json.loads(done.stdout)
    assert outcomes["chains"] >= count
    return outcomes


@pytest.mark.soak("virtio")
@pytest.mark.parametrize("build", ["plain", "sanitized"])
def test_forms_of_the_block_device_are_alike(build, seed, scale, request):
    count = scale(2000, FULL)
    if build == "plain":
        outcomes = run("block_fuzz", seed, count)
    else:
        library, environment = request.getfixturevalue("sanitized")
        outcomes = run("block_fuzz", seed, count, library, env=environment)
    assert outcomes["forms"] == ["structured", "flat", "native"], "./dev setup has built no extension"
    assert 0.1 < outcomes["refused"] / outcomes["examples"] < 0.9, "neither only sound rings nor only broken ones"


@pytest.mark.soak("virtio")
def test_rings_that_change_while_the_extension_reads_them(seed, scale, sanitized):
    library, environment = sanitized
    outcomes = run("native_fuzz", seed, scale(4000, FULL), library, env=environment)
    assert outcomes["served"] > outcomes["chains"] / 10
    assert outcomes["resets"] > 0
