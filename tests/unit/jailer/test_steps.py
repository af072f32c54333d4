"""Operations: done, undone in reverse, and what they do to files; no root needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jailer.errors import CellError, JailerError, StepError
from jailer.operations import Operation, Plan
from jailer.settings import CgroupItem, Limits, Settings
from jailer.steps import cgroups, detach, devices, directories, worker_cgroups


class Recorded(Operation):
    """Writes down what happens to it."""

    def __init__(self, name: str, record: list[str], fails: Exception | None = None, undo_fails: bool = False) -> None:
        self.name = name
        self.record = record
        self.fails = fails
        self.undo_fails = undo_fails
        self.step = name

    def describe(self) -> str:
        return f"do {self.name}"

    def do(self) -> None:
        if self.fails:
            raise self.fails
        self.record.append(f"+{self.name}")

    def undo(self) -> None:
        self.record.append(f"-{self.name}")
        if self.undo_fails:
            raise OSError(1, "no")


def test_a_failure_undoes_in_reverse() -> None:
    record: list[str] = []
    log: list[str] = []
    operations = [Recorded("a", record), Recorded("b", record, undo_fails=True), Recorded("c", record)]
    plan = Plan([*operations, Recorded("d", record, StepError("broken"))], log=log.append)
    with pytest.raises(StepError, match="broken"):
        plan.execute()
    assert record == ["+a", "+b", "+c", "-c", "-b", "-a"]
    assert len(log) == 1
    assert "do b" in log[0]
    plan.undo()
    assert len(record) == 6  # nothing is undone twice


def test_an_os_error_says_which_operation() -> None:
    with pytest.raises(StepError, match=r"do a: Resource busy \(os error 16\)"):
        Plan([Recorded("a", [], OSError(16, "x"))]).execute()


def test_steps_can_be_switched_off() -> None:
    record: list[str] = []
    plan = Plan([Recorded("a", record), Recorded("b", record)], frozenset({"a"}))
    plan.execute()
    assert record == ["+b"]
    assert plan.describe() == ["do a (switched off)", "do b"]


# ---------------------------------------------------------------- directories


def test_directories_are_made_and_unmade(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    root = directories.MakeJailRoot(str(tmp_path / "there/new/id/root"))
    root.do()
    assert root.made == [
        str(tmp_path / "there/new"),
        str(tmp_path / "there/new/id"),
        str(tmp_path / "there/new/id/root"),
    ]
    root.undo()
    assert os.listdir(tmp_path / "there") == []


def test_directories_in_use_stay(tmp_path: Path) -> None:
    root = directories.MakeJailRoot(str(tmp_path / "a/b/root"))
    root.do()
    (tmp_path / "a/other").touch()
    root.undo()
    assert os.listdir(tmp_path / "a") == ["other"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(StepError, match=f"Failed to create directory {tmp_path}/{path}: Not a directory"):
            directories.make_directories(str(tmp_path / path))


def test_userfaultfd(tmp_path: Path) -> None:
    misc = tmp_path / "misc"
    misc.write_text("232 kvm\n 126 userfaultfd\n")
    assert devices.userfaultfd_minor(str(misc)) == 126
    misc.write_text("232 kvm\n")
    assert devices.userfaultfd_minor(str(misc)) is None
    assert devices.userfaultfd_minor(str(tmp_path / "none")) is None


def test_pid_file(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    operation = detach.WritePidFile(lambda: directory, "vmm", 77)
    operation.do()
    assert (tmp_path / "vmm.pid").read_text() == "77"
    with pytest.raises(StepError, match=r"Failed to open file /vmm.pid: File exists \(os error 17\)"):
        detach.WritePidFile(lambda: directory, "vmm", 78).do()
    operation.undo()
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- cgroups, on a make-believe file system


def _settings(
    version: int, *items: str, parent: str = "vmm", given: bool = False, vcpu: tuple[str, ...] = ()
) -> Settings:
    parsed, of_vcpus = (
        tuple(CgroupItem(item.partition(".")[0], *item.split("=")) for item in each) for each in (items, vcpu)
    )
    # fmt: off
    return Settings(
        "id", "/x/vmm", "vmm", "/base/vmm/id", "/base/vmm/id/root", 1, 1, 0, "", False, False,
        version, parent, given, parsed, of_vcpus, Limits(2048, None),
    )
    # fmt: on


def _mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    path = tmp_path / "mounts"
    path.write_text(text)
    found = cgroups.find_hierarchies(str(path))
    monkeypatch.setattr(cgroups, "find_hierarchies", lambda: found)


def test_hierarchies(tmp_path: Path) -> None:
    path = tmp_path / "mounts"
    path.write_text(
        "cgroup /c\\040g/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n"
        "cgroup2 /c/unified cgroup2 rw 0 0\ncgroup2 /second cgroup2 rw 0 0\nproc /proc proc rw 0 0\nshort\n"
    )
    found = cgroups.find_hierarchies(str(path))
    assert found.v2 == "/c/unified"
    assert found.v1["cpu"] == found.v1["cpuacct"] == "/c g/cpu,cpuacct"
    with pytest.raises(StepError, match="Failed to open file"):
        cgroups.find_hierarchies(str(tmp_path / "none"))


def test_missing_hierarchy_and_controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _mounts(monkeypatch, tmp_path, "cgroup /c/cpu cgroup rw,cpu 0 0\n")
    with pytest.raises(StepError, match="Controller memory is unavailable"):
        cgroups.plan_items(_settings(1, "memory.x=1"))
    with pytest.raises(StepError, match=r"Hierarchy not found: No hierarchy found for this cgroup version\."):
        cgroups.plan_items(_settings(2, "memory.max=1"))
    assert cgroups.plan_items(_settings(2)).operations == ()


def test_v1_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _mounts(monkeypatch, tmp_path, "cgroup /c/cpu cgroup rw,cpu 0 0\ncgroup /c/cpuset cgroup rw,cpuset 0 0\n")
    plan = cgroups.plan_items(_settings(1, "cpu.shares=1", "cpuset.mems=0", "cpu.cfs_period_us=2", parent="p/q"))
    assert [operation.describe() for operation in plan.operations] == [
        "make cgroup /c/cpu/p/q/id",
        "write 1 to /c/cpu/p/q/id/cpu.shares",
        "make cgroup /c/cpuset/p/q/id",
        "inherit cpuset.cpus in cgroup /c/cpuset/p/q/id",
        "inherit cpuset.mems in cgroup /c/cpuset/p/q/id",
        "write 0 to /c/cpuset/p/q/id/cpuset.mems",
        "write 2 to /c/cpu/p/q/id/cpu.cfs_period_us",
        "join cgroup /c/cpu/p/q/id",
        "join cgroup /c/cpuset/p/q/id",
    ]
    assert plan.directories == ("/c/cpu/p/q/id", "/c/cpuset/p/q/id")


def test_v2_plan_joins_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _mounts(monkeypatch, tmp_path, "cgroup2 /c cgroup2 rw 0 0\n")
    plan = cgroups.plan_items(_settings(2, "cpu.weight=1", "memory.max=2", "cpu.max=3", "cgroup.max.depth=4"))
    assert [operation.describe() for operation in plan.operations] == [
        "make cgroup /c/vmm/id",
        "enable cgroup controller cpu",
        "enable cgroup controller memory",
        "write 1 to /c/vmm/id/cpu.weight",
        "write 2 to /c/vmm/id/memory.max",
        "write 3 to /c/vmm/id/cpu.max",
        "write 4 to /c/vmm/id/cgroup.max.depth",
        "join cgroup /c/vmm/id",
    ]


def test_v1_plan_with_a_cgroup_for_each_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker_cgroups, "MAX_WORKERS", 2)
    _mounts(monkeypatch, tmp_path, "cgroup /c/cpu cgroup rw,cpu 0 0\ncgroup /c/cpuset cgroup rw,cpuset 0 0\n")
    plan = cgroups.plan_items(_settings(1, "cpu.shares=1", vcpu=("cpuset.cpus=1",)))
    assert [operation.describe() for operation in plan.operations] == [
        "make cgroup /c/cpu/vmm/id",
        "write 1 to /c/cpu/vmm/id/cpu.shares",
        "make cgroup /c/cpuset/vmm/id",
        "inherit cpuset.cpus in cgroup /c/cpuset/vmm/id",
        "inherit cpuset.mems in cgroup /c/cpuset/vmm/id",
        "join cgroup /c/cpu/vmm/id",
        "make cgroup /c/cpuset/vmm/id/vcpu-0",
        "inherit cpuset.cpus in cgroup /c/cpuset/vmm/id/vcpu-0",
        "inherit cpuset.mems in cgroup /c/cpuset/vmm/id/vcpu-0",
        "write 1 to /c/cpuset/vmm/id/vcpu-0/cpuset.cpus",
        "make cgroup /c/cpuset/vmm/id/vcpu-1",
        "inherit cpuset.cpus in cgroup /c/cpuset/vmm/id/vcpu-1",
        "inherit cpuset.mems in cgroup /c/cpuset/vmm/id/vcpu-1",
        "write 1 to /c/cpuset/vmm/id/vcpu-1/cpuset.cpus",
        "open the workers' cgroups below /c/cpuset/vmm/id",
        "join cgroup /c/cpuset/vmm/id",
    ]
    workers = ("/c/cpuset/vmm/id/vcpu-0", "/c/cpuset/vmm/id/vcpu-1")
    assert plan.directories == ("/c/cpu/vmm/id", "/c/cpuset/vmm/id", *workers)


def test_v2_plan_with_a_cgroup_for_each_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threaded before a controller is enabled for them; --parent-cgroup is not joined itself."""
    monkeypatch.setattr(worker_cgroups, "MAX_WORKERS", 2)
    _mounts(monkeypatch, tmp_path, "cgroup2 /c cgroup2 rw 0 0\n")
    settings = _settings(2, given=True, vcpu=("cpu.weight=1", "cpu.max=3"))
    assert cgroups.plan_parent_only(settings).operations == ()
    plan = cgroups.plan_items(settings)
    assert [operation.describe() for operation in plan.operations] == [
        "make cgroup /c/vmm/id",
        "make cgroup /c/vmm/id/vcpu-0",
        "write threaded to /c/vmm/id/vcpu-0/cgroup.type",
        "make cgroup /c/vmm/id/vcpu-1",
        "write threaded to /c/vmm/id/vcpu-1/cgroup.type",
        "enable cgroup controller cpu",
        "write 1 to /c/vmm/id/vcpu-0/cpu.weight",
        "write 3 to /c/vmm/id/vcpu-0/cpu.max",
        "write 1 to /c/vmm/id/vcpu-1/cpu.weight",
        "write 3 to /c/vmm/id/vcpu-1/cpu.max",
        "open the workers' cgroups below /c/vmm/id",
        "join cgroup /c/vmm/id",
    ]
    assert plan.directories == ("/c/vmm/id", "/c/vmm/id/vcpu-0", "/c/vmm/id/vcpu-1")


def test_a_worker_joins_its_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(worker_cgroups, "MAX_WORKERS", 2)
    for worker in (0, 1):
        (tmp_path / f"vcpu-{worker}").mkdir()
        (tmp_path / f"vcpu-{worker}/cgroup.procs").touch()
    workers = worker_cgroups.WorkerCgroups(["cpu", "cpuset"])
    operation = worker_cgroups.OpenWorkerCgroups(str(tmp_path), workers)
    operation.do()
    workers.join(1)
    assert (tmp_path / "vcpu-0/cgroup.procs").read_text() == ""
    assert (tmp_path / "vcpu-1/cgroup.procs").read_text() == "0\n"
    own = "3:cpuset:/vmm/id\n2:pids:/vmm/id\n1:cpu,cpuacct:/vmm/id\n0::/\n"
    found = "3:cpuset:/vmm/id/vcpu-1\n2:pids:/vmm/id\n1:cpu,cpuacct:/vmm/id/vcpu-1\n0::/\n"
    assert workers.membership(1, own) == found
    assert workers.membership(7, own) == own
    os.close(workers.descriptors[0][0])
    with pytest.raises(CellError, match=r"cannot join the cgroup of worker 0: Bad file descriptor \(os error 9\)"):
        workers.join(0)
    workers.descriptors[0] = []
    unified = worker_cgroups.WorkerCgroups([""])
    unified.descriptors[0] = []
    assert unified.membership(0, "1:cpu:/x\n0::/vmm/id\n") == "1:cpu:/x\n0::/vmm/id/vcpu-0\n"


def test_workers_cgroups_that_cannot_be_opened_leave_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "vcpu-0").mkdir()
    (tmp_path / "vcpu-0/cgroup.procs").touch()
    before = os.listdir("/proc/self/fd")
    workers = worker_cgroups.WorkerCgroups(["cpu"])
    with pytest.raises(StepError, match=r"Failed to open file .*/vcpu-1/cgroup.procs: No such file"):
        worker_cgroups.OpenWorkerCgroups(str(tmp_path), workers).do()
    assert workers.descriptors == {}
    assert os.listdir("/proc/self/fd") == before


def test_cpuset_is_inherited_from_the_first_ancestor_that_has_one(tmp_path: Path) -> None:
    leaf = tmp_path / "p/q/id"
    leaf.mkdir(parents=True)
    (tmp_path / "cpuset.cpus").write_text("0-3\n")
    for directory in (tmp_path / "p", tmp_path / "p/q", leaf):
        (directory / "cpuset.cpus").write_text("\n")
    (tmp_path / "p/cpuset.cpus").write_text("1-2\n")
    cgroups.InheritValue(str(tmp_path), str(leaf), "cpuset.cpus").do()
    assert (leaf / "cpuset.cpus").read_text() == (tmp_path / "p/q/cpuset.cpus").read_text() == "1-2\n"
    assert (tmp_path / "cpuset.cpus").read_text() == "0-3\n"


def test_cpuset_that_is_empty_everywhere(tmp_path: Path) -> None:
    leaf = tmp_path / "id"
    leaf.mkdir()
    for directory in (tmp_path, leaf):
        (directory / "cpuset.cpus").write_text("\n")
    text = f"Failed to inherit cgroups configurations from file cpuset.cpus in path {leaf}"
    with pytest.raises(StepError, match=text):
        cgroups.InheritValue(str(tmp_path), str(leaf), "cpuset.cpus").do()


def test_controllers_are_enabled_from_the_root_down(tmp_path: Path) -> None:
    parent = tmp_path / "p"
    parent.mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    (parent / "cgroup.subtree_control").write_text("\n")
    operation = cgroups.EnableController(str(tmp_path), (str(parent),), "cpu")
    operation.do()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "cpu\n"  # on already
    assert (parent / "cgroup.subtree_control").read_text() == "+cpu\n"
    with pytest.raises(JailerError, match="Controller pids is unavailable"):
        cgroups.EnableController(str(tmp_path), (), "pids").do()


def test_current_cgroup() -> None:
    text = "4:cpu,cpuacct:/a/b\n1:name=systemd:/s\n0::/unified:with colon\n"
    assert cgroups.current_cgroup("cpuacct", text) == "/a/b"
    assert cgroups.current_cgroup("", text) == "/unified:with colon"
    assert cgroups.current_cgroup("pids", text) == ""


def test_writing_to_a_cgroup_file_that_does_not_exist_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"Failed to write to .*/none: No such file or directory \(os error 2\)"):
        cgroups.write_file(str(tmp_path / "none"), "1")
    assert os.listdir(tmp_path) == []
