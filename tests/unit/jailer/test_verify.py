"""Verification of the walls: what is asked for, what is found."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_WORKERS, Assignment, LaunchPlan
from jailer import bounds, verify, walls
from jailer.filters import RUNNING, SETUP

WORKER = Assignment(0, (0,), ())


def _plan(**changed: object) -> LaunchPlan:
    # fmt: off
    plan = LaunchPlan(
        "id", 1, True, 5, 6, (), 0, 0, 0, MAX_WORKERS, MAX_MEMORY_BYTES, "split", "", "kill", (), (), (),
        "/a", "/b", -1, -1,
    )
    # fmt: on
    return plan._replace(**changed)  # type: ignore[arg-type]


def _facts(**changed: object) -> verify.Asked:
    host = verify.HostFacts(dict.fromkeys(verify.NAMESPACES, 1), 0, True)
    inherited = dict.fromkeys(bounds.NAMES, resource.RLIM_INFINITY)
    facts = verify.Asked(host, None, "0::/\n", False, False, False, (1, 2), inherited)
    return facts._replace(**changed)  # type: ignore[arg-type]


def test_each_wall_is_asked_for_unless_it_is_switched_off() -> None:
    full = verify.asked(_plan(), "vcpu", _facts(), SETUP, assignment=WORKER)
    for wall, key in (
        (walls.IDENTITY, "uid"),
        (walls.CAPABILITIES, "capabilities"),
        (walls.NO_NEW_PRIVILEGES, "no_new_privs"),
        (walls.ROOT, "root"),
    ):
        assert key in full
        assert key not in verify.asked(_plan(switched_off=(wall,)), "vcpu", _facts(), SETUP), wall
    others = {"data size", "address space", "stack size"}, {"open files", "locked memory", "msgqueue size"}
    assert set(full["limits"]) > {"core file size"}.union(*others)
    for wall, limits in zip((walls.MEMORY_LIMIT, walls.KERNEL_LIMITS), others, strict=True):
        left = verify.asked(_plan(switched_off=(wall,)), "vcpu", _facts(), SETUP, assignment=WORKER)["limits"]
        assert limits.isdisjoint(left), wall
    off = (walls.CORE_LIMIT, walls.PROCESS_LIMIT, walls.MEMORY_LIMIT, walls.KERNEL_LIMITS)
    assert verify.asked(_plan(switched_off=off), "vcpu", _facts())["limits"] == {}
    assert "seccomp" not in verify.asked(_plan(seccomp="off"), "vcpu", _facts())
    assert full["namespaces"] == {"mnt": "own", "ipc": "own", "uts": "own", "net": "own", "pid": "host"}


def test_a_controller_without_a_jail_keeps_what_it_had_of_a_short_list() -> None:
    for had, kept in ((0, 0), (1 << 12, 0), (0x1FFFFFFFFFF, 2)):
        host = verify.HostFacts(dict.fromkeys(verify.NAMESPACES, 1), 0, True, had)
        asked = verify.asked(_plan(jailed=False), "vmm", _facts(host=host))["capabilities"]
        assert (asked["CapPrm"], asked["CapEff"]) == (f"{kept:016x}",) * 2
        assert {asked[each] for each in ("CapInh", "CapBnd", "CapAmb")} == {"0" * 16}
        assert set(verify.asked(_plan(jailed=False), "vcpu", _facts(host=host))["capabilities"].values()) == {"0" * 16}
        assert set(verify.asked(_plan(), "vmm", _facts(host=host))["capabilities"].values()) == {"0" * 16}


def test_the_cells_are_one_pid_namespace_below_their_supervisor() -> None:
    for visible_has_its_own in (False, True):
        facts = _facts(cells_own_pids=True, new_pid_namespace=visible_has_its_own)
        for role, depth in (("supervisor", 0), ("vmm", 1), ("vcpu", 1)):
            asked = verify.asked(_plan(), role, facts, SETUP)
            assert asked["pid_depth"] == depth
            assert asked["namespaces"]["pid"] == ("own" if depth or visible_has_its_own else "host")
    without = verify.asked(_plan(), "vcpu", _facts(), SETUP)
    assert "pid_depth" not in without
    unjailed = verify.asked(_plan(jailed=False), "vmm", _facts(cells_own_pids=True), SETUP)
    assert unjailed["pid_depth"] == 1
    assert "namespaces" not in unjailed


def test_a_process_is_ending_when_it_is_a_zombie() -> None:
    proc = verify.open_proc()
    assert not verify.is_ending(os.getpid(), proc)
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert verify.is_ending(pid, proc)
    os.waitpid(pid, 0)
    assert not verify.is_ending(pid, proc)  # there is nothing to be seen
    os.close(proc)


def test_what_is_asked_of_a_hidden_cell_can_be_read_of_it() -> None:
    """The kernel shows neither namespaces nor root of a process that is not dumpable."""
    bounded = (walls.MEMORY_LIMIT, walls.KERNEL_LIMITS)
    for role in ("vmm", "vcpu"):
        running = verify.asked(_plan(switched_off=bounded), role, _facts(), RUNNING)
        assert {"namespaces", "root", "cgroup"} & set(running) == set()
        assert running["limits"] == {"core file size": ["0", "0"], "processes": ["0", "0"]}
    assert "namespaces" in verify.asked(_plan(), "supervisor", _facts())  # it reads its own


def test_filters_are_counted_by_role_stage_and_host() -> None:
    host = verify.HostFacts(dict.fromkeys(verify.NAMESPACES, 1), 3, True)
    counts = {
        (role, stage): verify.asked(_plan(), role, _facts(host=host), stage)["seccomp"][0]["filters"]
        for role in ("vmm", "vcpu")
        for stage in (SETUP, RUNNING)
    }
    assert counts == {("vmm", SETUP): 4, ("vmm", RUNNING): 5, ("vcpu", SETUP): 5, ("vcpu", RUNNING): 6}
    assert verify.asked(_plan(), "supervisor", _facts(host=host))["seccomp"][0]["filters"] == 4


def test_the_files_of_a_process_are_read_when_it_shows_nothing_any_more(tmp_path: Path) -> None:
    """As in /proc that is mounted with hidepid: what was opened before stays readable, the rest is not there."""
    proc = verify.open_proc()
    nothing = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    files = verify.OpenFiles(os.getpid(), proc)
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))
    try:
        found = verify.found_hidden(os.getpid(), nothing, files, {"limits": {"core file size": []}})
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
    assert found["uid"] == [os.getuid()] * 4
    assert found["limits"]["core file size"][0] == "0"  # not as it was when they were opened
    assert [set(state) for state in found["seccomp"]] == [{"mode", "filters"}]
    files.close()
    assert "unreadable" in verify.found_hidden(os.getpid(), nothing, files, {})["status"]
    os.close(nothing)
    os.close(proc)


def test_reading_ones_own_walls() -> None:
    proc = verify.open_proc()
    host = verify.host_facts(proc)
    found = verify.found(os.getpid(), proc, host, {"limits": {"open files": []}})
    assert found["uid"] == [os.getuid()] * 4
    assert set(found["namespaces"].values()) == {"host"}
    assert found["pid_depth"] == 0
    assert found["root"]["inode"] == [os.stat("/").st_dev, os.stat("/").st_ino]
    assert len(found["limits"]["open files"]) == 2
    assert verify.differences({"uid": found["uid"]}, found) == []
    assert verify.differences({"uid": [0, 0, 0, 77]}, found) == [f"uid: asked [0, 0, 0, 77], found {found['uid']}"]
    gone = verify.found(2**22 - 3, proc, host, {})
    assert verify.differences({"uid": [0]}, gone) != []
    assert "unreadable" in gone["cgroup"]
    os.close(proc)
