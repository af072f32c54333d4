"""Every flag of the jailer, by its effect on each cell as /proc shows it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from functools import partial
from pathlib import Path

import pytest

from jailer.steps.identity import SUPERVISOR_CAPABILITIES
from tests.harness.jail import (
    FIRECRACKER,
    GID,
    JAILER,
    PROMISE_S,
    UID,
    descriptors,
    id_of,
    is_alive,
    limits,
    microvm,
    namespace,
    status,
    wait_for,
)
from tests.harness.run_options import NoLeftovers

ALL = ("supervisor", "vmm", "vcpu 0")
NO_CAPABILITIES = "0" * 16


def _mode(path: Path) -> tuple[str, int, int]:
    entry = path.lstat()
    return stat.filemode(entry.st_mode), entry.st_uid, entry.st_gid


def test_layout_of_the_jail_root(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        assert jailed.root == base / "firecracker" / id_of(base) / "root"
        for name in ("", "dev", "dev/net", "run", "run/cellblock"):
            assert _mode(jailed.root / name) == ("drwx------", UID, GID), name
        for name, number in (("dev/net/tun", (10, 200)), ("dev/kvm", (10, 232)), ("dev/urandom", (1, 9))):
            entry = (jailed.root / name).lstat()
            assert _mode(jailed.root / name) == ("crw-------", UID, GID), name
            assert (os.major(entry.st_rdev), os.minor(entry.st_rdev)) == number
        assert _mode(jailed.api_socket)[1:] == (UID, GID)
        assert jailed.pid_file.read_text() == str(jailed.process.pid)
        # The ipc directory is not visible outside the cells' namespaces.
        assert sorted(os.listdir(jailed.root)) == ["dev", "firecracker", "firecracker.pid", "kernel", "run"]
        assert os.listdir(jailed.root / "run" / "cellblock") == []


def test_identity_and_privileges_of_every_cell(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        for name, pid in jailed.wait_cells(*ALL).items():
            state = status(pid)
            uids, gids = set(state["Uid"].split()), set(state["Gid"].split())
            if name == "vcpu 0":  # a user and a group of its own (test_cell_identity.py)
                assert len(uids) == len(gids) == 1 and uids != {str(UID)} and gids != {str(GID)}
            else:
                assert (uids, gids) == ({str(UID)}, {str(GID)}), name
            assert state["Groups"] == "", name
            for capabilities in ("CapInh", "CapBnd", "CapAmb"):
                assert state[capabilities] == NO_CAPABILITIES, (name, capabilities)
            # In the user namespace of the cells alone, where nobody else is (test_cell_identity.py).
            kept = f"{SUPERVISOR_CAPABILITIES:016x}" if name == "supervisor" else NO_CAPABILITIES
            assert (state["CapPrm"], state["CapEff"]) == (kept, kept), name
            assert state["NoNewPrivs"] == "1", name
            for thread in Path(f"/proc/{pid}/task").iterdir():
                assert "\nSeccomp:\t2\n" in (thread / "status").read_text(), name
            assert limits(pid)["Max core file size"] == ["0", "0"], name
            # Non-dumpable: the files of the process in /proc belong to root.
            assert Path(f"/proc/{pid}/status").stat().st_uid == 0, name
        cells = jailed.cells()
        assert limits(cells["vmm"])["Max processes"] == limits(cells["vcpu 0"])["Max processes"] == ["0", "0"]


def test_namespaces_and_roots(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        for kind in ("mnt", "ipc", "uts"):
            assert len({namespace("self", kind), *(namespace(pid, kind) for pid in cells.values())}) == 3, kind
        assert len({namespace(pid, "net") for pid in cells.values()}) == 1
        assert namespace(cells["supervisor"], "net") != namespace("self", "net")
        assert namespace(cells["supervisor"], "pid") == namespace("self", "pid")
        assert namespace(cells["vmm"], "pid") == namespace(cells["vcpu 0"], "pid") != namespace("self", "pid")
        for name in ("supervisor", "vcpu 0"):
            root = Path(f"/proc/{cells[name]}/root")
            assert os.listdir(root) == ["ipc"], name
            assert os.statvfs(root).f_flag & os.ST_RDONLY, name
            assert os.statvfs(root / "ipc").f_flag & os.ST_RDONLY, name
        controller = Path(f"/proc/{cells['vmm']}/root")
        assert controller.stat().st_ino == jailed.root.stat().st_ino
        flags = os.statvfs(controller).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NOEXEC
        # The network of supervisor and workers has a loopback device that is down, and nothing else.
        devices = subprocess.run(
            ["nsenter", f"--net=/proc/{cells['vcpu 0']}/ns/net", "cat", "/proc/net/dev"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert [line.split(":")[0].strip() for line in devices.stdout.splitlines()[2:]] == ["lo"]


def test_descriptors_and_environment_of_the_caller_are_gone(base: Path) -> None:
    leak = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        with microvm(base) as jailed:
            jailed.add_guest("spin")
            jailed.start(close_fds=False, env={**os.environ, "SECRET_OF_THE_CALLER": "hunter2-hunter2"})
            jailed.boot()
            for name, pid in jailed.wait_cells(*ALL).items():
                links = descriptors(pid).values()
                assert "/etc/hostname" not in links, name
                assert b"hunter2-hunter2" not in Path(f"/proc/{pid}/environ").read_bytes(), name
                assert not any(link.endswith(".pid") for link in links) or name == "supervisor", (name, links)
            worker = descriptors(jailed.cells()["vcpu 0"])
            assert worker[0] == worker[1] == "/dev/null"
    finally:
        os.close(leak)


def test_worker_holds_no_kvm_device_and_no_directory(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        for name, pid in cells.items():
            for each, target in descriptors(pid).items():
                if name != "supervisor":
                    assert target != "/dev/kvm", name
                assert name != "vmm" or "kvm" not in target, target  # what it maps of a vCPU keeps no descriptor
                # A descriptor of a directory would be a way out of the root. The supervisor's /proc has no "..".
                try:
                    is_directory = stat.S_ISDIR(os.stat(f"/proc/{pid}/fd/{each}").st_mode)
                except FileNotFoundError:
                    continue  # closed meanwhile
                assert not is_directory or (name == "supervisor" and target == "/"), (name, target)


def test_netns(base: Path) -> None:
    path = base / "netns"
    path.touch()
    subprocess.run(["unshare", f"--net={path}", "true"], check=True)
    try:
        with microvm(base, "--netns", str(path)) as jailed:
            jailed.boot()
            cells = jailed.wait_cells(*ALL)
            assert os.stat(f"/proc/{cells['vmm']}/ns/net").st_ino == path.stat().st_ino
            assert os.stat(f"/proc/{cells['supervisor']}/ns/net").st_ino != path.stat().st_ino
            assert namespace(cells["supervisor"], "net") != namespace("self", "net")
            assert jailed.wall_records()["vmm"]["found"]["namespaces"]["net"] == "own"
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_new_pid_ns(base: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(names=(id_of(base),)), microvm(base, "--new-pid-ns") as jailed:
        jailed.boot()
        assert jailed.process.wait() == 0
        cells = jailed.wait_cells(*ALL)
        for pid in cells.values():
            assert namespace(pid, "pid") != namespace("self", "pid")
        assert status(cells["supervisor"])["NSpid"].split()[1:] == ["1"]
        assert status(cells["vmm"])["NSpid"].split()[2:] == ["1"]
        assert len(status(cells["vcpu 0"])["NSpid"].split()) == 3
        os.kill(jailed.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, cells.values())), "the end of every cell", seconds=PROMISE_S)


@pytest.mark.parametrize("off", [False, True])
def test_the_cells_have_a_pid_namespace_and_the_visible_process_stays(base: Path, off: bool) -> None:
    with microvm(base, *(["--without", "pid-namespace"] if off else [])) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        lines = [json.loads(line) for line in jailed.wall_log.read_text().splitlines() if line.startswith("{")]
        records = {record["walls"]: record for record in lines if "pid_depth" in record["found"]}
        for name, pid in cells.items():
            own = name != "supervisor" and not off
            assert (namespace(pid, "pid") != namespace("self", "pid")) == own
            assert records[name]["pid"] == pid  # as everybody outside knows it
            assert records[name]["found"]["pid_depth"] == int(own)
            assert records[name]["found"]["namespaces"]["pid"] == ("own" if own else "host")
        assert status(cells["vmm"])["NSpid"].split()[1:] == ([] if off else ["1"])
        assert [each["pid"] for each in jailed.api("GET", "/vcpus").body] == [cells["vcpu 0"]]
        os.kill(cells["vmm"], signal.SIGKILL)
        assert jailed.process.wait(30) == 1


def test_signals_reach_process_one_of_a_namespace(base: Path) -> None:
    with microvm(base, "--new-pid-ns") as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        os.kill(jailed.pid, signal.SIGTERM)
        wait_for(lambda: not any(map(is_alive, cells.values())), "the end of every cell", seconds=PROMISE_S)
        assert jailed.last_words().endswith("Firecracker exiting with error. exit_code=143")


@pytest.mark.parametrize("options", [("--daemonize",), ("--daemonize", "--new-pid-ns")])
def test_daemonize(base: Path, options: tuple[str, ...]) -> None:
    with microvm(base, *options) as jailed:
        jailed.boot()
        assert jailed.process.wait() == 0
        cells = jailed.wait_cells(*ALL)
        sessions = set()
        for name, pid in cells.items():
            links = descriptors(pid)
            assert links[0] == links[1] == "/dev/null", name
            assert links[2] == "/dev/null" if name == "supervisor" else links[2].startswith("pipe:"), (name, links[2])
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            sessions.add(int(fields[3]))
            assert int(fields[4]) == 0, f"{name} has a terminal"
        assert len(sessions) == 1
        assert sessions != {os.getsid(0)}
        assert status(jailed.pid)["PPid"] != str(os.getpid())
        os.kill(jailed.pid, signal.SIGTERM)
        wait_for(lambda: not any(map(is_alive, cells.values())), "the end of every cell")


def test_resource_limits(base: Path) -> None:
    options = ("--resource-limit", "fsize=1048576", "--resource-limit", "no-file=1024")
    with microvm(base, *options) as jailed:
        jailed.boot()  # guest memory of 64 MiB is far above the limit on file sizes
        for name, pid in jailed.wait_cells(*ALL).items():
            assert limits(pid)["Max file size"] == ["1048576", "1048576"], name
            files = "264" if name == "vcpu 0" else "1024"
            assert limits(pid)["Max open files"] == [files, files], name


def test_default_limits(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        for name, pid in jailed.wait_cells(*ALL).items():
            files = "264" if name == "vcpu 0" else "2048"
            assert limits(pid)["Max open files"] == [files, files], name
            assert limits(pid)["Max file size"] == ["unlimited", "unlimited"], name


def test_too_few_descriptors(base: Path) -> None:
    with microvm(base, "--resource-limit", "no-file=3") as jailed:
        assert jailed.run() == 1
        assert "No file descriptors available (os error 24)" in jailed.output()


def _cgroup_of(pid: int, controller: str) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path
    raise AssertionError(f"no controller {controller!r}")


@pytest.mark.parametrize("given", [False, True], ids=["default parent", "parent given"])
def test_cgroup_v1(base: Path, given: bool) -> None:
    options = ["--cgroup", "pids.max=77", "--cgroup", "cpuset.cpus=0", "--cgroup", "cpu.shares=200", "--cleanup"]
    where = Path("firecracker") / id_of(base)
    if given:
        where = Path(id_of(base, "parent")) / "nested" / id_of(base)
        options += ["--parent-cgroup", str(where.parent)]
    with microvm(base, *options) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        for controller, file, value in (
            ("pids", "pids.max", "77"),
            ("cpuset", "cpuset.cpus", "0"),
            ("cpu", "cpu.shares", "200"),
        ):
            directory = Path("/sys/fs/cgroup") / controller / where
            assert (directory / file).read_text().strip() == value
            members = set(map(int, (directory / "cgroup.procs").read_text().split()))
            assert members == set(cells.values()), controller
            for name, pid in cells.items():
                assert _cgroup_of(pid, controller) == f"/{where}", name
        assert Path("/sys/fs/cgroup/cpuset", where, "cpuset.mems").read_text().strip() != ""
        jailed.stop()
        # The default parent is every microVM's, so that only its own part of it is sure to go.
        gone = where.parts[0] if given else where
        wait_for(lambda: not list(Path("/sys/fs/cgroup").glob(f"*/{gone}")), "the cgroups to be removed")


def _is_alone_in(cgroup: Path, pid: int) -> bool:
    return (cgroup / "cgroup.procs").read_text() == f"{pid}\n"


def test_each_worker_has_a_cgroup_v1(base: Path) -> None:
    """The second worker for a vCPU as well; all other cells stay in the microVM's."""
    where = Path("firecracker") / id_of(base)
    options = ["--vcpu-cgroup", "cpu.shares=300", "--vcpu-cgroup", "cpuset.cpus=1", "--cgroup", "pids.max=90"]
    with microvm(base, *options, "--cleanup") as jailed:
        jailed.boot(vcpu_count=2, vcpu_placement="Split")
        assert jailed.api("PATCH", "/vcpus/1", {"action": "Replace"}).status == 204
        cells = jailed.wait_cells(*ALL, "vcpu 1")
        assert cells["vcpu 1"] == jailed.api("GET", "/vcpus").body[1]["pid"]
        for controller, file, value in (("cpu", "cpu.shares", "300"), ("cpuset", "cpuset.cpus", "1")):
            directory = Path("/sys/fs/cgroup") / controller / where
            members = set(map(int, (directory / "cgroup.procs").read_text().split()))
            assert members == {cells["supervisor"], cells["vmm"]}
            for worker in (0, 1):
                own = directory / f"vcpu-{worker}"
                assert (own / file).read_text().strip() == value
                # The one that was replaced, or was forked ahead for one vCPU, may not have ended yet.
                pid = cells[f"vcpu {worker}"]
                wait_for(partial(_is_alone_in, own, pid), f"the other workers in {own} to end")
        for name, pid in cells.items():
            assert _cgroup_of(pid, "pids") == f"/{where}", name
            assert jailed.wall_records()[name]["verified"], name
            files = descriptors(pid).values()
            assert any("cgroup.procs" in each for each in files) == (name == "supervisor"), name
        jailed.stop()
        wait_for(lambda: not list(Path("/sys/fs/cgroup").glob(f"*/{where}")), "the cgroups to be removed")


def test_worker_that_cannot_join_its_cgroup(base: Path) -> None:
    """No worker runs outside of it; here somebody has removed it."""
    with microvm(base, "--vcpu-cgroup", "cpu.shares=300", "--cleanup") as jailed:
        jailed.add_guest("spin")
        jailed.start().wait_up()
        os.rmdir(f"/sys/fs/cgroup/cpu/firecracker/{jailed.id}/vcpu-1")
        with pytest.raises(AssertionError, match="/actions"):
            jailed.boot(vcpu_count=2, vcpu_placement="Split")
        text = "cannot start: cannot join the cgroup of worker 1: No such device (os error 19)"
        wait_for(lambda: text in jailed.log(), jailed.describe)
        assert jailed.api("GET", "/").body["state"] == "Not started"
        assert jailed.stop() == -signal.SIGTERM
    wait_for(lambda: not list(Path("/sys/fs/cgroup").glob(f"*/firecracker/{jailed.id}")), "the cgroups to be removed")


def test_cgroup_v2_parent_only(base: Path) -> None:
    root = next(Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line)
    parent = root / id_of(base, "parent")
    parent.mkdir()
    options = ["--cgroup-version", "2", "--parent-cgroup", parent.name]
    try:
        with microvm(base, *options) as jailed:
            jailed.boot()
            cells = jailed.wait_cells(*ALL)
            assert set(map(int, (parent / "cgroup.procs").read_text().split())) == set(cells.values())
            assert not (parent / jailed.id).exists()
            jailed.stop()
    finally:
        wait_for(lambda: not (parent / "cgroup.procs").read_text(), "the parent to be empty")
        parent.rmdir()
    with microvm(base, *options, microvm_id=id_of(base, "other")) as jailed:
        jailed.boot()  # a parent that does not exist is not made
        assert not parent.exists()


def test_arguments_after_the_dashes(base: Path) -> None:
    with microvm(base, arguments=("--api-sock", "/other.socket", "--level", "Debug")) as jailed:
        jailed.api_socket = jailed.root / "other.socket"
        jailed.start().wait_up()
        assert _mode(jailed.api_socket)[1:] == (UID, GID)
        assert jailed.api("GET", "/").body["id"] == jailed.id


def test_any_name_of_the_launcher(base: Path) -> None:
    copy = base.parent / "my-vmm"
    copy.write_bytes(FIRECRACKER.read_bytes())
    copy.chmod(0o755)
    with microvm(base, exec_file=copy) as jailed:
        jailed.boot()
        assert jailed.pid_file.name == "my-vmm.pid"
        assert Path(f"/proc/{jailed.pid}/comm").read_text() == "my-vmm\n"


def test_files_that_the_host_bind_mounts_are_visible_inside(base: Path) -> None:
    with microvm(base) as jailed:
        (jailed.root / "mounted").mkdir(parents=True)
        source = base.parent / "source"
        source.mkdir()
        source.chmod(0o755)
        jailed.add_guest("spin")
        os.rename(jailed.root / "kernel", source / "kernel")
        subprocess.run(["mount", "--bind", source, jailed.root / "mounted"], check=True)
        try:
            jailed.start().wait_up()
            reply = jailed.api("PUT", "/boot-source", {"kernel_image_path": "/mounted/kernel"})
            assert reply.status == 204, reply.body
            jailed.stop()
        finally:
            subprocess.run(["umount", jailed.root / "mounted"], check=True)


def test_version_and_help() -> None:
    assert subprocess.run([JAILER, "--version"], check=True, capture_output=True).stdout == b"Jailer v1.17.0-dev\n"
    text = subprocess.run([JAILER, "--help"], check=True, capture_output=True, text=True).stdout
    for flag in ("--id", "--exec-file", "--netns", "--cgroup", "--without", "--purge"):
        assert flag in text


def test_pidof_and_ps_know_the_program_by_its_name(base: Path) -> None:
    """``pidof`` names the visible process, and none of the others."""
    name = f"fc{os.getpid()}"
    with microvm(base, "--daemonize", exec_file=_copy_of_the_launcher(base, name)) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        found = subprocess.run(["pidof", name], capture_output=True, text=True, check=True).stdout
        assert found.split() == [str(jailed.pid)]
        shown = {role: _arguments(pid) for role, pid in cells.items()}
        assert shown["vmm"] == f"{name}: vmm"
        assert shown["vcpu 0"] == f"{name}: vcpu 0"
        assert shown["supervisor"].startswith(f"{name} --id {jailed.id} --start-time-us ")


def _copy_of_the_launcher(base: Path, name: str) -> Path:
    copy = base.parent / name
    shutil.copy(FIRECRACKER, copy)
    return copy


def _arguments(pid: int) -> str:
    done = subprocess.run(["ps", "-o", "args=", "-ww", "-p", str(pid)], capture_output=True, text=True, check=True)
    return done.stdout.rstrip()
