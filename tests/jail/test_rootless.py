"""A jail that an ordinary user builds: as whole as a user namespace allows, and what it goes without is named."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.harness.jail import GID, JAILER, UID, is_alive, microvm, namespace, status, wait_for
from tests.harness.ordinary_user import become_user, start_rootless

ALL = ("supervisor", "vmm", "vcpu 0")
NAMESPACES = ("user", "mnt", "net", "ipc", "uts")
NO_CAPABILITIES = "0" * 16
#: A group that the user has beside its own.
GROUP = 34567


@pytest.mark.parametrize(("options", "groups"), [((), ()), (("--new-pid-ns",), ()), ((), (GROUP,))])
def test_a_guest_runs_in_a_rootless_jail(base: Path, options: tuple[str, ...], groups: tuple[int, ...]) -> None:
    with microvm(base, *options) as jailed:
        jailed.add_guest("spin")
        start_rootless(jailed, groups=groups)
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        for name, pid in cells.items():
            state = status(pid)
            assert state["Uid"].split() == [str(UID)] * 4, name
            assert state["Gid"].split() == [str(GID)] * 4, name
            assert state["Groups"].split() == [str(each) for each in groups], name
            assert [state[each] for each in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")] == [NO_CAPABILITIES] * 5
            assert (state["NoNewPrivs"], state["Seccomp"]) == ("1", "2"), name
            for kind in NAMESPACES:
                assert namespace(pid, kind) != namespace("self", kind), (name, kind)
            assert jailed.wall_records()[name]["verified"], name
        assert os.listdir(f"/proc/{cells['vcpu 0']}/root") == ["ipc"]
        assert "Rootless: device nodes are the host's own" in jailed.log()
        assert "no cgroup of its own" in jailed.log()
        assert ("the supervisor sees the host's /proc" in jailed.log()) == (not options)
        assert ("supplementary groups stay (65534)" in jailed.log()) == bool(groups)
        os.kill(jailed.pid, signal.SIGTERM)
        wait_for(lambda: not any(map(is_alive, cells.values())), "the end of every cell")


def test_the_device_nodes_are_mounts_that_the_host_does_not_see(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.add_guest("spin")
        start_rootless(jailed)
        jailed.boot()
        controller = jailed.wait_cells(*ALL)["vmm"]
        inside = Path(f"/proc/{controller}/root/dev/kvm").stat()
        assert stat.S_ISCHR(inside.st_mode) and inside.st_rdev == os.makedev(10, 232)
        assert stat.S_ISREG((jailed.root / "dev" / "kvm").stat().st_mode)


def test_a_janitor_removes_a_rootless_jail(base: Path) -> None:
    with microvm(base, "--cleanup") as jailed:
        jailed.add_guest("spin")
        start_rootless(jailed)
        jailed.boot()
        jailed.wait_cells(*ALL)
        os.kill(jailed.pid, signal.SIGKILL)
        wait_for(lambda: not jailed.directory.exists(), "the janitor")


@pytest.mark.parametrize(("flag", "other", "own"), [("uid", UID + 1, UID), ("gid", GID + 1, GID), ("uid", 0, UID)])
def test_only_the_own_ids_can_be_had(base: Path, flag: str, other: int, own: int) -> None:
    with microvm(base, **{flag: other}) as jailed:
        start_rootless(jailed)
        assert jailed.process.wait(30) == 1
        expected = f"--{flag} {other} is not yours: without root the cells can only be who you are (--{flag} {own})"
        assert expected in jailed.output()
        assert os.listdir(base) == []


def test_what_a_user_may_not_do_ends_the_launch_and_leaves_nothing(base: Path) -> None:
    with microvm(base, "--cgroup", "pids.max=10") as jailed:
        start_rootless(jailed)
        assert jailed.process.wait(30) == 1
        assert os.listdir(base) == []


def test_the_check_of_the_host_knows_what_an_ordinary_user_can_do(base: Path) -> None:
    command = [str(JAILER), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=become_user(base))
    assert re.search(r"privileges.*a jail is built in a user namespace", done.stdout), done.stdout
    assert re.search(r"namespaces.*cannot make", done.stdout) is None, done.stdout


def test_a_host_without_user_namespaces_says_what_to_do(base: Path) -> None:
    def none_left() -> None:
        # In a user namespace of its own, so that the limit is nobody else's.
        from jailer import syscalls

        ids = os.getresuid()
        parent = os.getpid()
        read_end, write_end = os.pipe()
        if not (child := os.fork()):
            os.read(read_end, 1)
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{parent}/{name}").write_text("0 0 100000")
            os._exit(0)
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(write_end, b"x")
        os.waitpid(child, 0)
        assert ids == os.getresuid()
        Path("/proc/sys/user/max_user_namespaces").write_text("0")

    with microvm(base) as jailed:
        start_rootless(jailed, before=none_left)
        assert jailed.process.wait(30) == 1
        assert "Failed to unshare into new user namespace: No space left on device" in jailed.output()
        assert "user.max_user_namespaces" in jailed.output()
        assert os.listdir(base) == []
