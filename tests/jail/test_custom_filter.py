"""--seccomp-filter: what a custom filter forbids ends a real cell, what it allows is still judged by ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from base.exit_codes import BAD_SYSCALL
from devtool.project import LAUNCHERS
from lab.client import ClientError, request
from tests.guests.build import build
from tests.harness.jail import FIRECRACKER, PATIENCE_S, JailedMicrovm, microvm, wait_for

ALL = ("supervisor", "vmm", "vcpu 0")
KVM_RUN = 0xAE80
ALLOW: dict[str, Any] = {"default_action": "allow", "filter_action": "trap", "filter": [{"syscall": "request_key"}]}


def _custom(directory: Path, **threads: Any) -> Path:
    """Compile a file with our own seccompiler-bin; threads that are not named allow everything."""
    source, output = directory / "filter.json", directory / "filter"
    source.write_text(json.dumps({**dict.fromkeys(("vmm", "api", "vcpu"), ALLOW), **threads}))
    files = ["--input-file", str(source), "--output-file", str(output)]
    subprocess.run([str(LAUNCHERS / "seccompiler-bin"), "--target-arch", "x86_64", *files], check=True)
    output.chmod(0o644)
    return output


def _trap(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"default_action": "allow", "filter_action": "trap", "filter": list(rules)}


def _jailed(jailed: JailedMicrovm, base: Path, **threads: Any) -> JailedMicrovm:
    jailed.root.mkdir(parents=True)
    shutil.copy(_custom(base.parent, **threads), jailed.root / "filter")
    jailed.add_guest("spin")
    return jailed.start()


ARGUMENTS = ("--seccomp-filter", "/filter", "--exerciser")


def test_a_filter_that_allows_everything_opens_nothing(base: Path) -> None:
    with microvm(base, "--drill", "vmm:chroot", arguments=ARGUMENTS) as jailed:
        _jailed(jailed, base)
        assert jailed.process.wait(PATIENCE_S) == BAD_SYSCALL


def test_a_guest_runs_behind_it_and_the_walls_are_as_many(base: Path) -> None:
    with microvm(base, arguments=ARGUMENTS) as jailed:
        _jailed(jailed, base)
        jailed.boot()
        jailed.wait_cells(*ALL)
        wait_for(lambda: all(jailed.wall_records()[name]["verified"] for name in ALL), jailed.describe)


@pytest.mark.parametrize("thread", ["api", "vmm"])
def test_the_controller_ends_by_a_call_that_it_forbids(base: Path, thread: str) -> None:
    with microvm(base, arguments=ARGUMENTS) as jailed:
        _jailed(jailed, base, **{thread: _trap({"syscall": "accept4"})})
        wait_for(jailed.api_socket.exists, jailed.describe)
        with pytest.raises((OSError, ClientError)):
            jailed.api("GET", "/")
        assert jailed.process.wait(PATIENCE_S) == BAD_SYSCALL


def test_a_worker_ends_by_a_call_that_it_forbids(base: Path) -> None:
    with microvm(base, arguments=ARGUMENTS) as jailed:
        run = {"index": 1, "type": "dword", "op": "eq", "val": KVM_RUN}
        _jailed(jailed, base, vcpu=_trap({"syscall": "ioctl", "args": [run]}))
        jailed.wait_up()
        jailed.api("PUT", "/boot-source", {"kernel_image_path": "/kernel"})
        jailed.api("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
        jailed.api("PUT", "/actions", {"action_type": "InstanceStart"})
        wait_for(lambda: "vcpu 0" in jailed.printed() and "seccomp" in jailed.log(), jailed.describe)
        assert jailed.process.wait(PATIENCE_S) == BAD_SYSCALL


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (os.urandom(300), "Seccomp error: Filter deserialization failed"),
        (b"", "Seccomp error: Filter deserialization failed"),
        (None, "Seccomp error: Filter file open error: /filter: No such file or directory"),
    ],
)
def test_what_is_no_filter_ends_the_launch_and_leaves_nothing(base: Path, content: bytes | None, text: str) -> None:
    with microvm(base, arguments=ARGUMENTS) as jailed:
        if content is not None:
            jailed.root.mkdir(parents=True)
            (jailed.root / "filter").write_bytes(content)
        before = sorted(base.rglob("*"))
        jailed.start()
        assert jailed.process.wait(PATIENCE_S) == 1
        assert text in jailed.output()
        assert sorted(base.rglob("*")) == before


def test_it_cannot_be_used_while_seccomp_is_off(base: Path) -> None:
    with microvm(base, "--seccomp-mode", "off", arguments=ARGUMENTS) as jailed:
        assert jailed.run() == 1
        assert "a custom seccomp filter cannot be used while seccomp is switched off" in jailed.output()


def test_without_a_jail(base: Path) -> None:
    shutil.copy(build("spin"), base / "kernel")
    custom = _custom(base, api=_trap({"syscall": "accept4"}))
    socket = base / "api.socket"
    command = [str(FIRECRACKER), "--api-sock", str(socket), "--seccomp-filter", str(custom)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(socket.exists, "the API socket")
            with pytest.raises((OSError, ClientError)):
                request(socket, "GET", "/", None, timeout=PATIENCE_S)
            assert process.wait(PATIENCE_S) == BAD_SYSCALL
        finally:
            process.kill()
