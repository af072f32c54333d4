"""A jail root that the user of an earlier microVM prepared, or changes while the jailer acts in it as root."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.hostile_root import LOOP, PREPARED, Victim, as_user, give, mounted, racing, victim_in
from tests.harness.jail import GID, UID, JailedMicrovm, id_of, microvm, stand_in, wait_for
from tests.harness.run_options import NoLeftovers, Scale


def _state(root: Path) -> dict[str, tuple[int, int, int]]:
    paths = [root, *(root / name for name in os.listdir(root))]
    return {str(path): (s.st_mode, s.st_uid, s.st_gid) for path in paths for s in [path.lstat()]}


@pytest.mark.parametrize("prepared", PREPARED)
def test_what_an_earlier_user_prepared_is_not_followed(base: Path, no_leftovers: NoLeftovers, prepared: str) -> None:
    where, act, text = PREPARED[prepared]
    with ExitStack() as stack:
        jailed = stack.enter_context(microvm(base))
        victim = victim_in(jailed, where, stack)
        as_user(jailed.root, act)
        before = _state(jailed.root)
        with no_leftovers(names=(jailed.id,)):
            assert jailed.run() == 1
        assert jailed.output() == f"{text}\n"
        victim.assert_untouched()
        assert _state(jailed.root) == before


@pytest.mark.parametrize("where", ["root", "root/run", "root/dev"])
def test_the_directory_above_the_jail_root_is_the_users(base: Path, where: str) -> None:
    """Then the user can put a link, or the host's mount, in the place of the jail root, or of what is in it."""
    with ExitStack() as stack:
        jailed = stack.enter_context(microvm(base))
        victim = Victim(base.parent / "victim")
        jailed.directory.mkdir(parents=True)
        if where == "root":
            stack.enter_context(mounted(victim.directory, jailed.directory / "images/data"))
            give(jailed.directory)
            as_user(jailed.directory, lambda: os.symlink("images/data", "root"))
            text = f"Failed to open jail root {jailed.root}: {LOOP}"
        else:
            name = where.removeprefix("root/")
            stack.enter_context(mounted(victim.directory, jailed.directory / "images" / name))
            give(jailed.directory)
            as_user(jailed.directory, lambda: os.rename("images", "root"))
            text = f"Failed to change owner for /{name}: Cross-device link (os error 18)"
        assert jailed.run() == 1
        assert jailed.output() == f"{text}\n"
        victim.assert_untouched()


def test_what_the_host_itself_arranged_works(base: Path) -> None:
    """As under Firecracker's jailer: mounts on the jail root and on its first level, links above it."""
    with ExitStack() as stack:
        jailed = stack.enter_context(microvm(base))
        elsewhere = base.parent / "elsewhere"
        (elsewhere / jailed.id / "root").mkdir(parents=True)
        (base / "firecracker").symlink_to(elsewhere)
        for name in ("", "dev", "run"):
            source = base.parent / f"source-{name}"
            source.mkdir()
            stack.enter_context(mounted(source, jailed.root / name))
        jailed.boot()
        assert (base.parent / "source-run/firecracker.socket").is_socket()
        assert sorted(os.listdir(base.parent / "source-dev")) == sorted(os.listdir(jailed.root / "dev"))
        assert {"kvm", "net", "urandom"} <= set(os.listdir(base.parent / "source-dev"))
        for name in ("", "dev", "run"):
            entry = (base.parent / f"source-{name}").stat()
            assert (entry.st_mode & 0o7777, entry.st_uid, entry.st_gid) == (0o700, UID, GID), name
        jailed.stop()


def test_a_failed_launch_gives_the_jail_root_back(base: Path) -> None:
    with microvm(base) as jailed:
        for name, mode in (("", 0o751), ("dev", 0o710), ("dev/net", 0o777)):
            (jailed.root / name).mkdir(parents=True, exist_ok=True)
            (jailed.root / name).chmod(mode)
            os.chown(jailed.root / name, 77, 78)
        (jailed.root / "firecracker.pid").write_text("1")
        before = _state(jailed.root), _state(jailed.root / "dev")
        assert jailed.run() == 1
        assert jailed.output() == "Failed to open file /firecracker.pid: File exists (os error 17)\n"
        assert (_state(jailed.root), _state(jailed.root / "dev")) == before


def test_names_that_are_swapped_during_the_launch(base: Path, scale: Scale, seed: int) -> None:
    """A process of the user races the jailer for every name that it uses; launches succeed or fail, the host stays."""
    ends = set()
    for count in range(scale(25, 1000)):
        with ExitStack() as stack:
            jailed = stand_in(base, "exit-3", microvm_id=id_of(base, str(count)))
            victim = victim_in(jailed, "data", stack)
            with racing(jailed.root, seed + count):
                ends.add(jailed.run())
            victim.assert_untouched()
            subprocess.run(["umount", jailed.root / "data"], check=True)
            subprocess.run(["rm", "-r", victim.directory, jailed.directory], check=True)
    assert ends <= {1, 3}


# ---------------------------------------------------------------- what the controller can do in its root

#: attack of the controller → the wall that stops it, and how.
IN_THE_ROOT = {
    "unlink-pid-file": ("pid-file", "refused: Device or resource busy (16)"),
    "replace-pid-file": ("pid-file", "refused: Device or resource busy (16)"),
    "open-kvm": ("unused-devices", "refused: Permission denied (13)"),
    "open-tun": ("unused-devices", "refused: Permission denied (13)"),
    "open-userfaultfd": ("unused-devices", "refused: Permission denied (13)"),
}


def _outcome(jailed: JailedMicrovm, attack: str) -> str:
    pattern = re.compile(rf"\bdrill {attack}: (.*)$", re.MULTILINE)
    return str(wait_for(lambda: pattern.search(jailed.output()), jailed.describe)[1])


@pytest.mark.parametrize("attack", IN_THE_ROOT)
def test_the_controller_attacks_files_in_its_root(base: Path, attack: str) -> None:
    wall, refused = IN_THE_ROOT[attack]
    if attack == "open-userfaultfd" and not Path("/dev/userfaultfd").exists():
        attack = "open-kvm"  # this host has no such device, so the jail root has none
    with microvm(base, "--drill", f"vmm:{attack}", "--without", wall, microvm_id=id_of(base, "open")) as jailed:
        jailed.start()
        assert _outcome(jailed, attack).startswith("succeeded")
        root = jailed.wall_records()["vmm"]["found"]["root"]
        assert root["read_only_files" if wall == "pid-file" else "closed_devices"] == []
    with microvm(base, "--drill", f"vmm:{attack}", microvm_id=id_of(base, "closed")) as jailed:
        jailed.start().wait_up()
        assert _outcome(jailed, attack) == refused
        assert jailed.pid_file.read_text() == str(jailed.process.pid)
        assert (jailed.pid_file.stat().st_uid, jailed.pid_file.stat().st_mode & 0o022) == (0, 0)
        record = jailed.wall_records()["vmm"]
        assert record["verified"]
        assert record["found"]["root"]["read_only_files"] == ["/firecracker.pid"]
        assert {"/dev/kvm", "/dev/net/tun"} <= set(record["found"]["root"]["closed_devices"])


def test_the_host_may_remove_the_pid_file(base: Path) -> None:
    """It is a mount in the controller's namespace only."""
    with microvm(base) as jailed:
        jailed.start().wait_up()
        jailed.pid_file.rename(jailed.root / "elsewhere")
        (jailed.root / "elsewhere").unlink()
        assert jailed.api("GET", "/").status == 200
        jailed.process.terminate()
        jailed.process.wait()


def test_a_device_that_the_host_put_into_the_root_can_be_opened(base: Path) -> None:
    """Clients hand drives in as device nodes: only the nodes that the jailer makes are closed."""
    with microvm(base) as jailed:
        jailed.root.mkdir(parents=True)
        os.mknod(jailed.root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (jailed.root / "null").chmod(0o666)
        jailed.start().wait_up()
        reply = jailed.api("PUT", "/logger", {"log_path": "/null"})
        assert reply.status == 204, reply.body
