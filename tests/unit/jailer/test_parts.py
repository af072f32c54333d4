"""Small parts of the jailer: log, memory, placement, removal, verification, host check, errors."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from pathlib import Path

import pytest

from ipc.launch_plan import MAX_MEMORY_BYTES, MAX_WORKERS, LaunchPlan
from jailer import cleanup, host_check, memory, placement, verify, walls
from jailer.cell import describe_error
from jailer.log import MAX_LINE, Log

# ---------------------------------------------------------------- log


def test_lines_have_firecrackers_format() -> None:
    read_end, write_end = os.pipe()
    log = Log(write_end, "my-vm")
    log.error("two\nlines")
    line = os.read(read_end, 4096).decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9} \[my-vm:supervisor:ERROR\] two lines\n", line)
    os.close(read_end)
    os.close(write_end)


def test_a_reader_that_does_not_read_costs_lines_not_time() -> None:
    read_end, write_end = os.pipe()
    log = Log(write_end, "id")
    for _ in range(100):
        log.info("x" * 5000)
    assert log.lost > 50
    os.set_blocking(read_end, False)
    lines = os.read(read_end, 1 << 20).splitlines(keepends=True)
    assert all(len(line) == MAX_LINE for line in lines)
    os.close(read_end)
    log.info("nobody there")
    os.close(write_end)
    log.info("not even a descriptor")


def test_records_are_json_on_one_line(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        Log(file.fileno(), "id").record({"text": "a\nb" * 5000})
    assert json.loads((tmp_path / "log").read_text()) == {"text": "a\nb" * 5000}


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("reserve", [False, True])
def test_memory_is_sealed_and_of_the_right_size(reserve: bool) -> None:
    maker = memory.MemoryMaker(reserve)
    for size in (4096, 1 << 30):
        descriptor = maker.make(size)
        assert os.fstat(descriptor).st_size == size
        assert os.fstat(descriptor).st_blocks == 0
        wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == wanted
        assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(descriptor)


@pytest.mark.parametrize(("reserve", "bound"), [(False, memory.MAX_MADE), (True, memory.RESERVED)])
def test_memory_is_bounded(reserve: bool, bound: int) -> None:
    maker = memory.MemoryMaker(reserve)
    for _ in range(bound):
        os.close(maker.make(4096))
    with pytest.raises(OSError, match="times") as error:
        maker.make(4096)
    assert error.value.errno == errno.EDQUOT


# ---------------------------------------------------------------- huge pages


@pytest.mark.parametrize(
    ("text", "given"),
    [("[always] madvise never\n", True), ("always [madvise] never\n", False), ("always madvise [never]\n", False)],
)
def test_huge_pages_only_where_the_host_gives_them_to_everybody(tmp_path: Path, text: str, given: bool) -> None:
    setting = tmp_path / "enabled"
    setting.write_text(text)
    assert memory.host_gives_huge_pages(str(setting)) is given


def test_a_kernel_without_huge_pages_gives_none(tmp_path: Path) -> None:
    assert not memory.host_gives_huge_pages(str(tmp_path / "missing"))


# ---------------------------------------------------------------- placement


@pytest.mark.parametrize(
    ("module", "parameter", "value", "kind"),
    [
        ("kvm_intel", "ept", "Y\n", "split"),
        ("kvm_intel", "ept", "N\n", "grouped"),
        ("kvm_amd", "npt", "1\n", "split"),
        ("kvm_amd", "npt", "0\n", "grouped"),
        ("kvm_pvm", "ept", "Y\n", "grouped"),
    ],
)
def test_placement(tmp_path: Path, module: str, parameter: str, value: str, kind: str) -> None:
    directory = tmp_path / module / "parameters"
    directory.mkdir(parents=True)
    (directory / parameter).write_text(value)
    assert placement.detect(str(tmp_path)).kind == kind


# ---------------------------------------------------------------- removal


def _remove(directory: Path, name: str) -> list[str]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return cleanup.remove_tree(descriptor, name)
    finally:
        os.close(descriptor)


def test_a_tree_is_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").touch()
    (tree / "a/link").symlink_to(outside)
    (tree / "up").symlink_to("..")
    os.mkfifo(tree / "fifo")
    assert _remove(tmp_path, "tree") == []
    assert _remove(tmp_path, "tree") == []  # gone already
    assert sorted(os.listdir(tmp_path)) == ["outside"]
    assert os.listdir(outside) == ["file"]


def test_a_link_in_place_of_the_tree(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "tree").symlink_to(outside)
    assert _remove(tmp_path, "tree") == []
    assert os.listdir(tmp_path) == ["outside"]


def test_a_tree_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path
    for _ in range(cleanup.MAX_DEPTH + 2):
        path = path / "d"
        path.mkdir()
    failures = _remove(tmp_path, "d")
    assert len(failures) == 1
    assert "nested too deeply" in failures[0]


def test_shared_directories_are_removed_only_when_empty(tmp_path: Path) -> None:
    (tmp_path / "shared/other").mkdir(parents=True)
    item = cleanup.leftover(str(tmp_path / "shared"), only_empty=True)
    assert cleanup.remove_all([item]) == []
    assert (tmp_path / "shared/other").exists()
    (tmp_path / "shared/other").rmdir()
    assert cleanup.remove_all([item]) == []
    assert not (tmp_path / "shared").exists()
    os.close(item.parent)


def test_a_busy_cgroup_is_reported(tmp_path: Path) -> None:
    (tmp_path / "group/member").mkdir(parents=True)  # ENOTEMPTY instead of EBUSY: not waited for
    item = cleanup.leftover(str(tmp_path / "group"), is_cgroup=True)
    failures = cleanup.remove(item, time.monotonic())
    assert failures == [f"{tmp_path}/group: Directory not empty (os error 39)"]
    os.close(item.parent)


# ---------------------------------------------------------------- verification


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
    return verify.Asked(host, None, "0::/\n", False, False, (1, 2))._replace(**changed)  # type: ignore[arg-type]


def test_each_wall_is_asked_for_unless_it_is_switched_off() -> None:
    full = verify.asked(_plan(), "vcpu", _facts())
    for wall, key in (
        (walls.IDENTITY, "uid"),
        (walls.CAPABILITIES, "capabilities"),
        (walls.NO_NEW_PRIVILEGES, "no_new_privs"),
        (walls.ROOT, "root"),
    ):
        assert key in full
        assert key not in verify.asked(_plan(switched_off=(wall,)), "vcpu", _facts()), wall
    assert full["limits"] == {"core file size": ["0", "0"], "processes": ["0", "0"]}
    off = (walls.CORE_LIMIT, walls.PROCESS_LIMIT)
    assert verify.asked(_plan(switched_off=off), "vcpu", _facts())["limits"] == {}
    assert "seccomp" not in verify.asked(_plan(seccomp="off"), "vcpu", _facts())
    assert full["namespaces"] == {"mnt": "own", "ipc": "own", "uts": "own", "net": "own", "pid": "host"}


def test_filters_are_counted_by_role_and_host() -> None:
    host = verify.HostFacts(dict.fromkeys(verify.NAMESPACES, 1), 3, True)
    counts = {
        role: verify.asked(_plan(), role, _facts(host=host))["seccomp"][0]["filters"]
        for role in ("supervisor", "vmm", "vcpu")
    }
    assert counts == {"supervisor": 4, "vmm": 4, "vcpu": 5}


def test_reading_ones_own_walls() -> None:
    proc = verify.open_proc()
    host = verify.host_facts(proc)
    found = verify.found(os.getpid(), proc, host, {"limits": {"open files": []}})
    assert found["uid"] == [os.getuid()] * 4
    assert set(found["namespaces"].values()) == {"host"}
    assert found["root"]["inode"] == [os.stat("/").st_dev, os.stat("/").st_ino]
    assert len(found["limits"]["open files"]) == 2
    assert verify.differences({"uid": found["uid"]}, found) == []
    assert verify.differences({"uid": [0, 0, 0, 77]}, found) == [f"uid: asked [0, 0, 0, 77], found {found['uid']}"]
    gone = verify.found(2**22 - 3, proc, host, {})
    assert verify.differences({"uid": [0]}, gone) != []
    assert "unreadable" in gone["cgroup"]
    os.close(proc)


# ---------------------------------------------------------------- the rest


def test_host_check_tells_what_is_missing_and_how_to_mend_it() -> None:
    findings = [
        host_check.Finding("one", host_check.GOOD, "fine", "unused"),
        host_check.Finding("two", host_check.BAD, "broken", "mend it"),
    ]
    assert host_check.report(findings) == (
        "     ok  one: fine\nMISSING  two: broken\n         → mend it\n1 of 2 checks failed.\n"
    )
    missing = host_check.check_kvm("/no/such/device")
    assert [finding.state for finding in missing] == [host_check.BAD]
    assert "load kvm_intel or kvm_amd" in missing[0].remedy
    not_kvm = host_check.check_kvm("/dev/null")
    assert [finding.state for finding in not_kvm] == [host_check.BAD]


def test_a_defect_is_described_in_one_line_without_source() -> None:
    with pytest.raises(KeyError) as error:
        dict[str, int]()["missing"]
    assert re.search(r"^KeyError: 'missing' at \w+\.py:\d+$", describe_error(error.value))
    assert describe_error(ValueError("x")) == "ValueError: x"
