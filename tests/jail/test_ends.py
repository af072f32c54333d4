"""How the visible process ends, as whoever started it sees it, and where the reason of a refused start is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from devtool.project import PYTHON
from lab.client import launch_unjailed
from tests.guests.build import build
from tests.harness.jail import FIRECRACKER, JAILER, PATIENCE_S, JailedMicrovm, microvm

#: Run by itself, since a process is a subreaper for good: starts a jailer that detaches, and ends what it left.
_REAPER = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
pid_file, number, *command = sys.argv[1:]
assert subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0
pid = int(open(pid_file).read())
os.kill(pid, int(number))
while True:
    found, status = os.waitpid(-1, 0)
    if found == pid:
        print(os.waitstatus_to_exitcode(status))
        break
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("options", "is_process_1"),
    [(("--daemonize",), False), (("--new-pid-ns",), True), (("--daemonize", "--new-pid-ns"), True)],
    ids=lambda each: "+".join(each) if isinstance(each, tuple) else "",
)
def test_what_reaps_a_detached_microvm_sees(
    base: Path, options: tuple[str, ...], is_process_1: bool, number: signal.Signals
) -> None:
    """Process 1 of a namespace does not die by a signal of its own: there it is an exit status."""
    with microvm(base, *options) as jailed:
        command = [str(PYTHON), "-c", _REAPER, str(jailed.pid_file), str(int(number)), *jailed.command]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert seen.returncode == 0, seen.stderr
    if number == signal.SIGHUP:
        expected = 156
    else:
        expected = 128 + number if is_process_1 else -number
    assert int(seen.stdout.splitlines()[-1]) == expected  # before it, what the microVM logged


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=lambda each: each.name)
def test_without_a_jail_it_dies_by_the_signal_after_an_orderly_end(tmp_path: Path, number: signal.Signals) -> None:
    log, metrics = tmp_path / "log", tmp_path / "metrics"
    with launch_unjailed(tmp_path, ["--log-path", str(log), "--metrics-path", str(metrics)]) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))})
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        vm.process.send_signal(number)
        assert vm.wait() == -number
    lines = log.read_text().splitlines()
    assert any(f"Shutting down VM after intercepting signal {int(number)}, code 0." in line for line in lines)
    assert lines[-1].endswith(f"Firecracker exiting with error. exit_code={128 + number}")
    assert len(metrics.read_text().splitlines()) == 2


# ---------------------------------------------------------------- refused starts


def _refused(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a firecracker that does not start; return its status, standard error and what the log got."""
    log = tmp_path / "the-log"
    done = subprocess.run(
        [FIRECRACKER, "--log-path", str(log), *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr, log.read_text() if log.exists() else ""


@pytest.mark.parametrize(
    ("socket", "reason"),
    [
        ("no/such/s", "Failed to bind and run the HTTP server: IO error: No such file or directory (os error 2)"),
        ("taken", "Failed to open the API socket at: {path}. Check that it is not already used."),
        ("s" * 120, "Failed to bind and run the HTTP server: IO error: path must be shorter than SUN_LEN"),
        ("taken/s", "Failed to bind and run the HTTP server: IO error: Not a directory (os error 20)"),
    ],
)
def test_an_api_socket_that_cannot_be_made_is_told_with_its_reason(tmp_path: Path, socket: str, reason: str) -> None:
    (tmp_path / "taken").touch()
    path = str(tmp_path / socket)
    status, errors, log = _refused(tmp_path, "--api-sock", path)
    text = reason.format(path=path)
    assert status == 1
    assert text in errors
    assert f"RunWithApiError error: {text}\n" in log
    assert log.endswith("Firecracker exiting with error. exit_code=1\n")


def test_what_fails_before_there_is_a_controller_is_in_the_log_too(tmp_path: Path) -> None:
    status, errors, log = _refused(tmp_path, "--wall-log", "/no/such/file", "--id", "early")
    assert status == 1
    assert errors == "Failed to open file /no/such/file: No such file or directory (os error 2)\n"
    assert "[early:main] Failed to open file /no/such/file: No such file or directory (os error 2)\n" in log
    assert log.endswith("Firecracker exiting with error. exit_code=1\n")


def test_metrics_that_cannot_be_written_are_told_in_the_log(tmp_path: Path) -> None:
    status, _, log = _refused(tmp_path, "--metrics-path", "/no/such/file", "--api-sock", str(tmp_path / "s"))
    assert status == 1
    assert "Cannot initialize the metrics system due to bad user input: No such file or directory (os error 2)" in log


def _document(tmp_path: Path, **sections: object) -> list[str]:
    content = {"boot-source": {"kernel_image_path": str(build("reset"))}, "drives": [], **sections}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return ["--no-api", "--config-file", str(path)]


def test_a_refused_start_is_no_death_by_a_signal(tmp_path: Path) -> None:
    """The worker that was forked ahead is ended on purpose: nobody is to think of the OOM killer."""
    for _ in range(5):
        arguments = _document(tmp_path, **{"boot-source": {"kernel_image_path": "/no/such/kernel"}})
        status, errors, log = _refused(tmp_path, *arguments)
        assert (status, errors) == (1, "")
        assert "No such file or directory (os error 2)" in log
        (tmp_path / "the-log").unlink()


def test_a_clean_run_writes_nothing_to_standard_error(tmp_path: Path) -> None:
    status, errors, log = _refused(tmp_path, *_document(tmp_path))
    assert (status, errors) == (0, "")
    assert "Walls of vmm verified (seccomp: kill)." in log
    assert '{"walls"' not in log


def test_the_walls_reports_go_where_they_are_wanted(tmp_path: Path) -> None:
    walls = tmp_path / "walls"
    status, errors, _ = _refused(tmp_path, "--wall-log", str(walls), *_document(tmp_path))
    assert (status, errors) == (0, "")
    reports = [json.loads(line) for line in walls.read_text().splitlines()]
    assert {each["walls"] for each in reports} == {"supervisor", "vmm", "vcpu 0"}
    assert all(each["verified"] for each in reports)


@pytest.mark.parametrize("size", [1_000_000_000, (1022 << 10) + 1, 0xFFFF_FFFF])
def test_more_memory_than_there_can_be(tmp_path: Path, size: int) -> None:
    """No name of a message of ours reaches a client."""
    with launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))})
        vm.must("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": size})
        reply = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
        assert reply.status == 400
        reason = "Invalid Memory Configuration: Cannot create mmap region: Out of memory (os error 12)"
        assert reply.body == {"fault_message": f"Start microvm error: {reason}"}


# ---------------------------------------------------------------- limits on processes

#: Where nobody else makes a cgroup.
PARENT_CGROUP = f"ends-{os.getpid()}"


def _limited(base: Path, limit: int, vcpus: int) -> JailedMicrovm:
    jailed = JailedMicrovm(
        base, "--parent-cgroup", PARENT_CGROUP, "--cgroup", f"pids.max={limit}",
        microvm_id=f"pids-{os.getpid()}-{limit}", arguments=("--no-api", "--config-file", "/config.json"),
    )  # fmt: skip
    jailed.add_guest("reset")
    content = {
        "boot-source": {"kernel_image_path": "/kernel"},
        "drives": [],
        "machine-config": {"vcpu_count": vcpus, "mem_size_mib": 64},
    }
    (jailed.root / "config.json").write_text(json.dumps(content))
    return jailed


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_limit_on_processes_that_is_too_low_is_named(base: Path, vcpus: int) -> None:
    """Whatever is the first that cannot be made: a process, a thread of ours, a thread of ZeroMQ."""
    statuses = []
    for limit in range(1, 40):
        jailed = _limited(base, limit, vcpus)
        statuses.append(jailed.run())
        purge = [str(JAILER), "--purge", jailed.id, "--chroot-base-dir", str(base), "--parent-cgroup", PARENT_CGROUP]
        subprocess.run(purge, check=True, capture_output=True)
        said = jailed.describe()
        if statuses[-1] == 0:
            break
        assert "Resource temporarily unavailable (os error 11)" in said, (limit, said)
        assert "pids.max" in said, (limit, said)
        assert "forbidden system call" not in said
    os.rmdir(f"/sys/fs/cgroup/pids/{PARENT_CGROUP}")
    assert statuses[-1] == 0
    assert set(statuses[:-1]) == {1}
    assert len(statuses) > 5
