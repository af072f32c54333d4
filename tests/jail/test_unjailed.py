"""``firecracker`` started directly: the same cells without a jail, also for an ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipc.launch_plan import MAX_DEVICES
from jailer.steps.identity import SUPERVISOR_CAPABILITIES, UNJAILED_CAPABILITIES
from jailer.steps.user_namespace import FIRST_UID
from lab.client import request
from tests.guests.build import build
from tests.harness.jail import (
    FIRECRACKER,
    PATIENCE_S,
    PROMISE_S,
    children,
    count_tun,
    descriptors,
    is_alive,
    namespace,
    status,
    wait_for,
)
from tests.harness.run_options import NoLeftovers

USER = 4321


class Direct:
    """One run of ``firecracker``."""

    def __init__(self, directory: Path, *arguments: str, command: Sequence[str | Path] = (FIRECRACKER,)) -> None:
        self.socket = directory / "api.socket"
        self.errors = directory / "errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, "--api-sock", str(self.socket), *arguments],
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )  # fmt: skip

    def api(self, method: str, target: str, body: object = None) -> tuple[int, object]:
        reply = request(self.socket, method, target, body, timeout=PATIENCE_S)
        return reply.status, reply.body

    def wait_up(self) -> Direct:
        def up() -> bool:
            assert self.process.poll() is None, self.errors.read_text()
            try:
                return self.api("GET", "/")[0] == 200
            except OSError:
                return False

        wait_for(up, lambda: f"the API: {self.errors.read_text()}")
        return self

    def boot(self, kernel: Path) -> tuple[int, object]:
        self.wait_up()
        assert self.api("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})[0] == 204
        assert self.api("PUT", "/boot-source", {"kernel_image_path": str(kernel), "boot_args": "0"})[0] == 204
        return self.api("PUT", "/actions", {"action_type": "InstanceStart"})

    def cells(self) -> dict[str, int]:
        return {"supervisor": self.process.pid, **children(self.process.pid)}


@contextmanager
def direct(directory: Path, *arguments: str, command: Sequence[str | Path] = (FIRECRACKER,)) -> Iterator[Direct]:
    running = Direct(directory, *arguments, command=command)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait()


@pytest.fixture
def directory(base: Path) -> Path:
    """Return a directory that every user may write to, with a tiny kernel in it."""
    base.chmod(0o777)
    shutil.copy(build("spin"), base / "kernel")
    (base / "kernel").chmod(0o644)
    return base


def as_user(*prefix: str) -> list[str | Path]:
    """Return the command that runs firecracker as an ordinary user."""
    return [*prefix, "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", FIRECRACKER]


def test_as_root_the_cells_have_an_empty_network(directory: Path) -> None:
    with direct(directory) as running:
        assert running.boot(directory / "kernel")[0] == 204
        cells = running.cells()
        own = {namespace(cells[name], "net") for name in ("supervisor", "vmm", "vcpu 0")}
        assert len(own) == 1
        assert namespace("self", "net") not in own


def test_an_ordinary_user_stays_in_its_network(directory: Path) -> None:
    with direct(directory, command=as_user()) as running:
        running.wait_up()
        assert namespace(running.cells()["vmm"], "net") == namespace("self", "net")


def test_tun_descriptors_are_the_controllers_alone(directory: Path) -> None:
    with direct(directory) as running:
        running.wait_up()
        held = {name: count_tun(pid) for name, pid in running.cells().items()}
        assert held.pop("vmm") == MAX_DEVICES
        assert not any(held.values())


def ipc_directory(controller: int) -> Path:
    """Return the directory of the sockets that a controller listens on. (Others' directories are beside it.)"""
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in descriptors(controller).values()}
    lines = [line.split() for line in Path(f"/proc/{controller}/net/unix").read_text().splitlines()[1:]]
    paths = [Path(fields[7]) for fields in lines if len(fields) > 7 and fields[6] in inodes]
    (directory,) = {path.parent for path in paths if path.parent.name.startswith("cellblock-")}
    return directory


def test_as_root(directory: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(), direct(directory) as running:
        assert running.boot(directory / "kernel")[0] == 204
        cells = running.cells()
        assert set(cells) == {"supervisor", "vmm", "vcpu 0"}
        for name, pid in cells.items():
            assert status(pid)["NoNewPrivs"] == "1", name
            assert status(pid)["Seccomp"] == "2", name
            assert namespace(pid, "mnt") == namespace("self", "mnt"), name
            # The controller's is CAP_DAC_OVERRIDE; those of the supervisor end at the users of its cells.
            own = {"vmm": UNJAILED_CAPABILITIES, "supervisor": SUPERVISOR_CAPABILITIES}
            kept = f"{own.get(name, 0):016x}"
            assert [status(pid)[each] for each in ("CapPrm", "CapEff")] == [kept] * 2, name
            assert [status(pid)[each] for each in ("CapInh", "CapBnd", "CapAmb")] == ["0" * 16] * 3, name
        users = {name: set(status(pid)["Uid"].split()) for name, pid in cells.items()}
        assert users["vmm"] == users["supervisor"] == {"0"}
        assert len(users["vcpu 0"]) == 1
        assert int(users["vcpu 0"].pop()) >= FIRST_UID
        sockets = ipc_directory(cells["vmm"])
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o711
        running.process.terminate()
        assert running.process.wait(10) == -signal.SIGTERM
    wait_for(lambda: not sockets.exists(), "the janitor")


def test_root_names_files_of_any_owner(directory: Path) -> None:
    """As Firecracker as root: that is what the one capability is for."""
    private = directory / "private"
    private.mkdir(mode=0o700)
    shutil.copy(directory / "kernel", private)
    for path in (private, private / "kernel"):
        path.chmod(0o700 if path == private else 0o600)
        os.chown(path, USER, USER)
    walls = directory / "walls"
    with direct(directory, "--wall-log", str(walls), "--log-path", str(private / "log")) as running:
        assert running.boot(private / "kernel")[0] == 204
        assert "Running Firecracker" in (private / "log").read_text()
        records = [json.loads(line) for line in walls.read_text().splitlines() if line.startswith("{")]
        report = next(record for record in records if record["walls"] == "vmm")
        assert report["verified"]
        assert report["asked"]["capabilities"]["CapEff"] == report["found"]["capabilities"]["CapEff"] == "0" * 15 + "2"


def test_as_an_ordinary_user(directory: Path) -> None:
    """With a /dev/kvm of its own, since the host's belongs to root."""
    node = directory.parent / "kvm"
    os.mknod(node, 0o20666, os.makedev(10, 232))
    node.chmod(0o666)
    mount = ("unshare", "--mount", "sh", "-c", f'mount --bind {node} /dev/kvm && exec "$@"', "sh")
    with direct(directory, command=as_user(*mount)) as running:
        assert running.boot(directory / "kernel")[0] == 204, running.errors.read_text()
        cells = running.cells()
        assert set(cells) == {"supervisor", "vmm", "vcpu 0"}
        for name, pid in cells.items():
            assert status(pid)["Uid"].split() == [str(USER)] * 4, name
            assert status(pid)["Seccomp"] == "2", name
        sockets = ipc_directory(cells["vmm"])
        assert sockets.is_dir()
        running.process.send_signal(signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, cells.values())), "the end of every cell", PROMISE_S)
    wait_for(lambda: not sockets.exists(), "the janitor")


def _own_pids(running: Direct) -> set[str]:
    here = namespace("self", "pid")
    return {name for name, pid in running.cells().items() if namespace(pid, "pid") != here}


def test_a_pid_namespace_for_the_cells_if_the_caller_may_make_one(directory: Path) -> None:
    report = directory / "walls"
    with direct(directory, "--wall-log", str(report)) as running:
        assert running.boot(directory / "kernel")[0] == 204
        assert _own_pids(running) == {"vmm", "vcpu 0"}
        records = [json.loads(line) for line in report.read_text().splitlines()]
        depths = {record["walls"]: record["asked"]["pid_depth"] for record in records if "pid_depth" in record["asked"]}
        assert depths == {"supervisor": 0, "vmm": 1, "vcpu 0": 1}
    (directory / "api.socket").unlink()
    with direct(directory, "--without", "pid-namespace") as running:
        assert running.boot(directory / "kernel")[0] == 204
        assert _own_pids(running) == set()
        assert "switched off: pid-namespace" in running.errors.read_text()
    (directory / "api.socket").unlink()
    with direct(directory, "--wall-log", str(directory / "user"), command=as_user()) as running:
        running.wait_up()
        assert _own_pids(running) == set()
        lines = wait_for((directory / "user").read_text, "a report").splitlines()
        for record in map(json.loads, lines):
            assert "pid_depth" not in record["asked"]
            assert record["found"].get("pid_depth", 0) == 0


def test_an_unknown_wall_cannot_be_switched_off(directory: Path) -> None:
    result = subprocess.run([FIRECRACKER, "--without", "sense"], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("--without sense: the steps are descriptors, ")


def test_without_kvm_it_can_still_be_configured(directory: Path) -> None:
    with direct(directory, command=as_user()) as running:
        code, body = running.boot(directory / "kernel")
        assert (code, body) == (
            400,
            {"fault_message": "Start microvm error: Error creating KVM object: Permission denied (os error 13)"},
        )
        assert running.api("GET", "/version")[0] == 200


def test_no_seccomp(directory: Path) -> None:
    with direct(directory, "--no-seccomp") as running:
        assert running.boot(directory / "kernel")[0] == 204
        for name, pid in running.cells().items():
            assert status(pid)["Seccomp"] == "0", name
        assert "seccomp is off in every cell" in running.errors.read_text()


def test_descriptors_of_the_caller_reach_the_controller_only(directory: Path) -> None:
    """``--config-file <(…)`` of a shell works; supervisor and workers hold nothing of the caller."""
    read_end, write_end = os.pipe()
    os.set_inheritable(read_end, True)
    try:
        running = subprocess.Popen(
            [FIRECRACKER, "--api-sock", directory / "api.socket"], pass_fds=(read_end,),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for((directory / "api.socket").exists, "the API")
            cells = wait_for(lambda: "vcpu 0" in (found := children(running.pid)) and found, "the cells")
            pipe = os.readlink(f"/proc/self/fd/{read_end}")
            assert pipe in descriptors(cells["vmm"]).values()
            assert pipe not in descriptors(cells["vcpu 0"]).values()
            assert pipe not in descriptors(running.pid).values()
        finally:
            running.kill()
            running.wait()
    finally:
        os.close(read_end)
        os.close(write_end)


def test_bad_arguments(directory: Path) -> None:
    result = subprocess.run([FIRECRACKER, "--nonsense"], check=False, capture_output=True, text=True)
    assert result.returncode == 153
    assert result.stderr.startswith("Arguments parsing error: ")
    version = subprocess.run([FIRECRACKER, "--version"], check=True, capture_output=True)
    assert version.stdout.startswith(b"Firecracker v")
