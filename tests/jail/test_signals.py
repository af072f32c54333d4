"""Signals to a jailed microVM as clients see them: log, last metrics line, exit code (docs/formats/api.md)."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from devtool.project import LAUNCHERS
from lab.client import ClientError, launch_unjailed
from tests.guests.build import build
from tests.harness.jail import GID, UID, JailedMicrovm, children, microvm, wait_for

#: What each signal means: exit code (in the log; SIGTERM ends the process itself), group and key of the metric.
ENDINGS = [
    (signal.SIGTERM, 143, None),
    (signal.SIGHUP, 156, "signals.sighup"),
    (signal.SIGBUS, 149, "signals.sigbus"),
    (signal.SIGSEGV, 150, "signals.sigsegv"),
    (signal.SIGXFSZ, 151, "signals.sigxfsz"),
    (signal.SIGXCPU, 154, "signals.sigxcpu"),
    (signal.SIGILL, 157, "signals.sigill"),
    (signal.SIGSYS, 2, "seccomp.num_faults"),
]


def prepare(jailed: JailedMicrovm) -> JailedMicrovm:
    """Start a guest with a directory for log and metrics."""
    directory = jailed.root / "out"
    directory.mkdir(parents=True)
    os.chown(directory, UID, GID)
    jailed.add_guest("spin")
    return jailed.start().wait_up().boot()


def arguments() -> tuple[str, ...]:
    return ("--exerciser", "--log-path", "/out/log", "--metrics-path", "/out/metrics")


def metrics(jailed: JailedMicrovm) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (jailed.root / "out" / "metrics").read_text().splitlines()]


def log(jailed: JailedMicrovm) -> list[str]:
    return (jailed.root / "out" / "log").read_text().splitlines()


def counted(line: dict[str, Any]) -> set[str]:
    """Return the metrics about signals that are not 0."""
    signals = {f"signals.{key}" for key, value in line["signals"].items() if value}
    return signals | ({"seccomp.num_faults"} if line["seccomp"]["num_faults"] else set())


@pytest.mark.parametrize(("number", "code", "key"), ENDINGS, ids=lambda value: getattr(value, "name", str(value)))
def test_a_signal_is_logged_counted_and_ends_the_microvm(
    base: Path, number: signal.Signals, code: int, key: str | None
) -> None:
    with microvm(base, arguments=arguments()) as jailed:
        prepare(jailed)
        assert len(metrics(jailed)) == 1
        os.kill(jailed.pid, number)
        assert jailed.process.wait(30) == (-number if number == signal.SIGTERM else code)
        assert f"Shutting down VM after intercepting signal {int(number)}, code 0." in "\n".join(log(jailed))
        assert log(jailed)[-1].endswith(f"Firecracker exiting with error. exit_code={code}")
        first, last = metrics(jailed)
        assert counted(first) == set()
        assert counted(last) == ({key} if key else set())


def test_a_broken_pipe_ends_nothing(base: Path) -> None:
    with microvm(base, arguments=arguments()) as jailed:
        prepare(jailed)
        os.kill(jailed.pid, signal.SIGPIPE)
        wait_for(lambda: any("Received signal 13, code 0." in line for line in log(jailed)), "the log line")
        assert jailed.api("PUT", "/actions", {"action_type": "FlushMetrics"}).status == 204
        assert metrics(jailed)[1]["signals"]["sigpipe"] == 1
        assert jailed.stop() == -signal.SIGTERM
        assert counted(metrics(jailed)[-1]) == set()


def test_a_standard_error_that_nobody_reads(tmp_path: Path) -> None:
    """The supervisor's lines are lost, and each is a SIGPIPE to itself; that must not be logged in turn."""
    reader, writer = os.pipe()
    os.close(reader)
    api, log_file = tmp_path / "api.socket", tmp_path / "log"
    command = [str(LAUNCHERS / "firecracker"), "--api-sock", str(api), "--log-path", str(log_file)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    try:
        wait_for(lambda: log_file.exists() and "API server started." in log_file.read_text(), "the API")
        process.send_signal(signal.SIGPIPE)  # makes it write a line
        wait_for(lambda: "Received signal 13" in log_file.read_text(), "the log line")
        before = cpu_seconds(process.pid)
        time.sleep(0.3)
        assert cpu_seconds(process.pid) - before < 0.1, "the supervisor is busy with itself"
        assert log_file.read_text().count("Received signal 13") == 1
        process.terminate()
        assert process.wait(30.0) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("number", "code", "key"),
    [
        (signal.SIGSEGV, 150, "sigsegv"),
        (signal.SIGBUS, 149, "sigbus"),
        (signal.SIGILL, 157, "sigill"),
        (signal.SIGXFSZ, 151, "sigxfsz"),
        (signal.SIGKILL, 1, None),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_worker_that_dies_by_a_signal_ends_the_microvm_with_its_code(
    base: Path, number: signal.Signals, code: int, key: str | None
) -> None:
    with microvm(base, arguments=arguments()) as jailed:
        prepare(jailed)
        worker = children(jailed.pid)["vcpu 0"]
        os.kill(worker, number)
        assert jailed.process.wait(30) == code
        name = signal.Signals(number).name
        assert any(f"Worker vcpu 0 (pid {worker}) was ended by signal {name}" in line for line in log(jailed))
        assert f"was ended by signal {int(number)} ({name})" in jailed.log()
        assert log(jailed)[-1].endswith(f"Firecracker exiting with error. exit_code={code}")
        last = metrics(jailed)[-1]
        assert {name for name, value in last["signals"].items() if value} == ({key} if key else set())


@pytest.mark.parametrize(
    ("number", "code", "options"),
    [
        # Of the signals that are sent to it, process 1 of a pid namespace dies by this one only.
        (signal.SIGKILL, 1, ()),
        (signal.SIGSEGV, 150, ("--without", "pid-namespace")),
        (signal.SIGBUS, 149, ("--without", "pid-namespace")),
        (signal.SIGABRT, 1, ("--without", "pid-namespace")),
    ],
)
def test_the_supervisor_reports_a_controller_that_dies_by_a_signal(
    base: Path, number: signal.Signals, code: int, options: tuple[str, ...]
) -> None:
    with microvm(base, *options, arguments=arguments()) as jailed:
        prepare(jailed)
        controller = children(jailed.pid)["vmm"]
        os.kill(controller, number)
        assert jailed.process.wait(30) == code
        *_, how, last = jailed.log().splitlines()
        assert f"vmm (pid {controller}) was ended by signal {int(number)} ({signal.Signals(number).name})" in how
        assert last.endswith(f"Firecracker exiting with error. exit_code={code}")


@pytest.mark.parametrize("options", [(), ("--without", "pid-namespace"), ("--new-pid-ns",)], ids=["", "shared", "new"])
@pytest.mark.parametrize(("action", "number", "code"), [("crash", 11, 150), ("kill", 9, 1)])
def test_a_controller_that_ends_in_the_middle_takes_its_workers_along_unreported(
    base: Path, options: tuple[str, ...], action: str, number: int, code: int
) -> None:
    """The kernel kills the workers before process 1 has ended: no line accuses whoever kills processes here."""
    fault = ("--arm-fault", f"vmm.configured={action}")
    with microvm(base, *fault, *options, arguments=arguments()) as jailed:
        jailed.add_guest("spin")
        (jailed.root / "out").mkdir()
        os.chown(jailed.root / "out", UID, GID)
        jailed.start()
        with suppress(ConnectionError, ClientError):
            jailed.boot()
        status = jailed.process.wait(30)
        assert status == (0 if "--new-pid-ns" in options else code)
        wait_for(lambda: "exit_code=" in jailed.log(), jailed.describe)
        lines = jailed.log().splitlines()
        assert re.search(rf"vmm \(pid \d+\) was ended by signal {number} ", lines[-2])
        assert lines[-1].endswith(f"Firecracker exiting with error. exit_code={code}")
        assert "vcpu" not in jailed.log()


def test_a_file_beyond_its_limit_ends_the_microvm(base: Path) -> None:
    """As with Firecracker, nobody gets an answer: the request that made the file grow loses its connection."""
    limit = 32768
    with microvm(base, "--resource-limit", f"fsize={limit}", arguments=arguments()) as jailed:
        prepare(jailed)
        answered: list[int] = []
        with suppress(ConnectionError, ClientError):
            while len(answered) < 100:
                answered.append(jailed.api("PUT", "/actions", {"action_type": "FlushMetrics"}).status)
        assert answered == [204] * len(answered)
        assert 0 < len(answered) < 100
        assert jailed.process.wait(30) == 151
        path = jailed.root / "out" / "metrics"
        assert path.stat().st_size <= limit
        assert "Shutting down VM after intercepting signal 25, code 0." in "\n".join(log(jailed))
        assert log(jailed)[-1].endswith("Firecracker exiting with error. exit_code=151")
        # The line that went over the limit is cut off there; whole lines before it are whole.
        *whole, _rest = path.read_bytes().split(b"\n")
        assert all(json.loads(line) for line in whole)


def test_memory_beyond_the_limit_of_files_fails_the_start_only(tmp_path: Path) -> None:
    """Un-jailed, the limit is the supervisor's, too: the memfd cannot be made, and the microVM can be configured on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kernel = str(build("spin"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        vm = launch_unjailed(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": kernel})
        for _ in range(2):
            reply = vm.api("PUT", "/actions", {"action_type": "InstanceStart"})
            assert reply.status == 400
            reason = "Invalid Memory Configuration: Cannot create mmap region: File too large (os error 27)"
            assert reply.body == {"fault_message": f"Start microvm error: {reason}"}
        assert vm.must("GET", "/")["state"] == "Not started"
        vm.process.terminate()
        assert vm.wait() == -signal.SIGTERM
