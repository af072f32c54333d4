"""The jail on another kernel, with pure cgroup v2 and every capability: what the host of the jail tests lacks."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from jailer.steps.identity import SUPERVISOR_CAPABILITIES
from tests.harness.hostile_root import PREPARED, as_user, racing, victim_in
from tests.harness.jail import id_of, is_alive, limits, microvm, namespace, stand_in, status, wait_for

ALL = ("supervisor", "vmm", "vcpu 0")
CGROUPS = Path("/sys/fs/cgroup")
NO_CAPABILITIES = "0" * 16
#: Python is slow in the emulated machine.
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def pure_v2() -> None:
    """These tests are about cgroup v2: fail, not skip, where it is not there."""
    assert (CGROUPS / "cgroup.controllers").exists(), "cgroup v2 is not mounted at /sys/fs/cgroup"


def test_cgroup_v2(base: Path) -> None:
    # fmt: off
    options = [
        "--cgroup-version", "2", "--parent-cgroup", "jail-lab/nested", "--cgroup", "pids.max=55",
        "--cgroup", "memory.max=1073741824", "--cgroup", "cpu.weight=200", "--cleanup", "--new-pid-ns",
    ]
    # fmt: on
    directory = CGROUPS / "jail-lab" / "nested" / id_of(base)
    with microvm(base, *options) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        for file, value in (("pids.max", "55"), ("memory.max", "1073741824"), ("cpu.weight", "200")):
            assert (directory / file).read_text().strip() == value
        for level in (CGROUPS, CGROUPS / "jail-lab", CGROUPS / "jail-lab" / "nested"):
            enabled = (level / "cgroup.subtree_control").read_text().split()
            assert {"pids", "memory", "cpu"} <= set(enabled), level
        # KVM's kernel thread for huge pages (kvm-nx-lpage-recovery) joins the cgroup of the VM's maker.
        assert set(map(int, (directory / "cgroup.procs").read_text().split())) >= set(cells.values())
        for name, pid in cells.items():
            assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::/jail-lab/nested/{jailed.id}\n", name
            assert jailed.wall_records()[name]["verified"], name
        os.kill(jailed.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, cells.values())), "the end of every cell", PATIENCE_S)
        # The directories that the launch made go, and so do their parents that it made.
        wait_for(lambda: not (CGROUPS / "jail-lab").exists(), "the janitor", PATIENCE_S)
        wait_for(lambda: not jailed.directory.exists(), "the janitor", PATIENCE_S)


def test_each_worker_has_a_threaded_cgroup(base: Path) -> None:
    """Its limit holds it back; the microVM's cgroup still lists every process, and has its own limits."""
    # fmt: off
    options = [
        "--cgroup-version", "2", "--parent-cgroup", "jail-lab", "--cgroup", "memory.max=1073741824",
        "--vcpu-cgroup", "cpu.max=20000 100000", "--vcpu-cgroup", "cpuset.cpus=1", "--cleanup",
    ]
    # fmt: on
    directory = CGROUPS / "jail-lab" / id_of(base)
    with microvm(base, *options) as jailed:
        jailed.boot(vcpu_count=2, vcpu_placement="Split")
        cells = jailed.wait_cells(*ALL, "vcpu 1")
        assert (directory / "cgroup.type").read_text() == "domain threaded\n"
        assert (directory / "memory.max").read_text() == "1073741824\n"
        assert set(map(int, (directory / "cgroup.procs").read_text().split())) >= set(cells.values())
        for name, pid in cells.items():
            own = f"/vcpu-{name.partition(' ')[2]}" if name.startswith("vcpu") else ""
            assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::/jail-lab/{jailed.id}{own}\n", name
            assert jailed.wall_records()[name]["verified"], name
            if own:
                threads = set(map(int, (directory / own[1:] / "cgroup.threads").read_text().split()))
                assert threads >= set(map(int, os.listdir(f"/proc/{pid}/task")))
                assert (directory / own[1:] / "cpuset.cpus").read_text() == "1\n"
        # The first vCPU of this guest never sleeps.
        statistics = directory / "vcpu-0" / "cpu.stat"
        wait_for(lambda: "nr_throttled 0\n" not in statistics.read_text(), statistics.read_text, PATIENCE_S)
        jailed.stop()
        wait_for(lambda: not (CGROUPS / "jail-lab").exists(), "the janitor", PATIENCE_S)


def test_parent_with_domain_controllers_is_busy(base: Path) -> None:
    parent = CGROUPS / "jail-lab-busy"
    parent.mkdir()
    try:
        enabled = CGROUPS / "cgroup.subtree_control"
        if "memory" not in enabled.read_text().split():
            enabled.write_text("+memory")
        (parent / "child").mkdir()
        (parent / "cgroup.subtree_control").write_text("+memory")
        with microvm(base, "--cgroup-version", "2", "--parent-cgroup", parent.name) as jailed:
            assert jailed.run() == 1
            expected = f"Failed to move process to cgroup ({parent}): Resource busy (os error 16)\n"
            assert jailed.output() == expected
            assert not jailed.directory.exists()
    finally:
        (parent / "child").rmdir()
        parent.rmdir()


def test_unknown_controller_is_refused(base: Path) -> None:
    with microvm(base, "--cgroup-version", "2", "--cgroup", "nonsense.max=1") as jailed:
        assert jailed.run() == 1
        assert jailed.output() == "Controller nonsense is unavailable\n"
    assert not (CGROUPS / "firecracker").exists()
    assert os.listdir(base) == []


def test_walls_on_this_kernel(base: Path) -> None:
    with microvm(base, "--resource-limit", "no-file=500") as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        for name, pid in cells.items():
            state = status(pid)
            kept = f"{SUPERVISOR_CAPABILITIES:016x}" if name == "supervisor" else NO_CAPABILITIES
            assert [state[each] for each in ("CapPrm", "CapEff")] == [kept] * 2, name
            assert [state[each] for each in ("CapInh", "CapBnd", "CapAmb")] == [NO_CAPABILITIES] * 3, name
            assert (state["NoNewPrivs"], state["Seccomp"]) == ("1", "2"), name
            files = "264" if name.startswith("vcpu") else "500"  # a worker gets no more than it needs
            assert limits(pid)["Max open files"] == [files, files], name
            assert namespace(pid, "mnt") != namespace("self", "mnt"), name
            assert Path(f"/proc/{pid}/status").stat().st_uid == 0, name
        assert os.listdir(f"/proc/{cells['vcpu 0']}/root") == ["ipc"]
        assert jailed.stop() == -signal.SIGTERM


@pytest.mark.parametrize("prepared", PREPARED)
def test_a_prepared_jail_root_on_this_kernel(base: Path, prepared: str) -> None:
    where, act, text = PREPARED[prepared]
    with ExitStack() as stack:
        jailed = stack.enter_context(microvm(base))
        victim = victim_in(jailed, where, stack)
        as_user(jailed.root, act)
        assert jailed.run() == 1
        assert jailed.output() == f"{text}\n"
        victim.assert_untouched()


def test_a_race_for_the_names_in_the_jail_root(base: Path, seed: int) -> None:
    for count in range(3):
        with ExitStack() as stack:
            jailed = stand_in(base, "exit-3", microvm_id=id_of(base, str(count)))
            victim = victim_in(jailed, "data", stack)
            with racing(jailed.root, seed + count):
                assert jailed.run() in (1, 3)
            victim.assert_untouched()
            subprocess.run(["umount", jailed.root / "data"], check=True)
            subprocess.run(["rm", "-r", victim.directory, jailed.directory], check=True)


@pytest.mark.parametrize("attack", ["execve", "open"])
def test_attacks_on_this_kernel(base: Path, attack: str) -> None:
    with microvm(base, "--drill", attack) as jailed:
        jailed.start()
        if attack == "open":
            text = "drill open: refused: Permission denied (13)"
            wait_for(lambda: text in jailed.output(), jailed.describe, PATIENCE_S)
        else:
            text = "wall seccomp: ended by the filter for a forbidden system call"
            wait_for(lambda: text in jailed.log(), jailed.describe, PATIENCE_S)
            assert "vcpu 0 (pid " in jailed.log()
        assert f"drill {attack}: succeeded" not in jailed.output()
