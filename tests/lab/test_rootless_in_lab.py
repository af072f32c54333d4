"""An ordinary user boots Debian in a jail of its own, in a cgroup that it was given (pure cgroup v2)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.debian import BOOT_TIMEOUT, boot_args
from tests.harness.jail import GID, UID, id_of, microvm, namespace, status, wait_for
from tests.harness.ordinary_user import start_rootless

CGROUPS = Path("/sys/fs/cgroup")
ALL = ("supervisor", "vmm", "vcpu 0")


@pytest.fixture
def delegated(base: Path) -> Iterator[Path]:
    """A cgroup that belongs to the user: what a service manager delegates (cgroup-v2.rst, "Delegation Containment")."""
    (CGROUPS / "cgroup.subtree_control").write_text("+pids +memory")
    made = CGROUPS / f"user-{id_of(base)}"
    inside = made / "session"
    inside.mkdir(parents=True)
    for directory in (made, inside):
        for path in (directory, *(directory / f"cgroup.{each}" for each in ("procs", "threads", "subtree_control"))):
            os.chown(path, UID, GID)
    yield made
    wait_for(lambda: not (inside / "cgroup.procs").read_text(), "an empty session")
    for directory in sorted((each for each in made.rglob("*") if each.is_dir()), reverse=True):
        directory.rmdir()
    made.rmdir()


def test_debian_boots_in_a_rootless_jail(base: Path, delegated: Path, guest_image) -> None:
    parent = f"{delegated.name}/microvms"
    # fmt: off
    options = [
        "--cgroup-version", "2", "--parent-cgroup", parent, "--cgroup", "pids.max=55", "--cgroup",
        "memory.max=1073741824", "--cleanup",
    ]
    # fmt: on
    with microvm(base, *options, arguments=()) as jailed:
        jailed.root.mkdir(parents=True)
        for source, name in ((guest_image.vmlinuz, "vmlinuz"), (guest_image.initramfs, "initramfs")):
            shutil.copy(source, jailed.root / name)
            (jailed.root / name).chmod(0o644)
        session = delegated / "session" / "cgroup.procs"
        start_rootless(jailed, before=lambda: session.write_text(str(os.getpid())))
        jailed.wait_up()
        for target, body in (
            ("/machine-config", {"vcpu_count": 2, "mem_size_mib": 256}),
            ("/boot-source", {"kernel_image_path": "/vmlinuz", "initrd_path": "/initramfs", "boot_args": boot_args()}),
            ("/actions", {"action_type": "InstanceStart"}),
        ):
            reply = jailed.api("PUT", target, body)
            assert reply.status == 204, (target, reply.body, jailed.describe())
        cells = jailed.wait_cells(*ALL, "vcpu 1")
        for name, pid in cells.items():
            assert status(pid)["Uid"].split() == [str(UID)] * 4, name
            assert namespace(pid, "user") != namespace("self", "user"), name
            assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::/{parent}/{jailed.id}\n", name
        assert (CGROUPS / parent / jailed.id / "pids.max").read_text() == "55\n"
        wait_for(lambda: "CELLBLOCK-DONE" in jailed.printed(), jailed.describe, BOOT_TIMEOUT)
        assert jailed.process.wait(BOOT_TIMEOUT) == 0, jailed.describe()
        assert "no cgroup of its own" not in jailed.log()
        wait_for(lambda: not jailed.directory.exists(), "the janitor")
