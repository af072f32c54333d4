"""Must-show 4: every exit kind through the whole product, on this host's /dev/kvm, not jailed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from lab.client import Microvm, descendants, launch_unjailed
from tests.guests.build import build
from tests.harness.microvms import exerciser_counts, launch_config

#: Counted writes in one round of the exerciser guest.
COUNTS_PER_ROUND = 14


def finish(microvm: Microvm) -> tuple[int, str]:
    """Wait for the end; return exit status and output."""
    status = microvm.wait(900.0)
    return status, microvm.console.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.soak("exits")
def test_every_exit_kind_arrives_once_and_in_order(tmp_path, scale, no_leftovers):
    rounds = scale(300, 5_000)
    with (
        no_leftovers(tmp_path),
        launch_config(tmp_path, build("exerciser"), "--exerciser", boot_args=str(rounds)) as vm,
    ):
        status, output = finish(vm)
        (tmp_path / "config.json").unlink()
    assert exerciser_counts(output) == (rounds * COUNTS_PER_ROUND, 0, 0)
    assert status == 0
    assert "Firecracker exiting successfully. exit_code=0" in output


@pytest.mark.soak("exits")
def test_exits_survive_pauses(tmp_path, scale, seed):
    """Pause and resume in a tight loop while the guest exits all the time: no exit is lost or repeated."""
    pauses = scale(100, 1_000)
    generator = random.Random(seed)
    with launch_unjailed(tmp_path, ["--exerciser"]) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("exerciser")), "boot_args": str(10_000_000)})
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        for _ in range(pauses):
            vm.must("PATCH", "/vm", {"state": "Paused"})
            vm.must("PATCH", "/vm", {"state": "Resumed"})
            time.sleep(generator.random() * 0.002)
        assert vm.must("GET", "/")["state"] == "Running"
        vm.process.terminate()
        vm.wait()
        output = vm.console.decode(errors="replace")
    assert "instead of" not in output


@pytest.mark.parametrize(
    ("guest", "status", "words"),
    [
        ("triple_fault", 1, "shutdown"),
        ("reset", 0, "Vmm is stopping."),
    ],
)
def test_ends_of_the_guest(tmp_path, no_leftovers, guest, status, words):
    with no_leftovers(tmp_path), launch_config(tmp_path, build(guest)) as vm:
        code, output = finish(vm)
        (tmp_path / "config.json").unlink()
    assert code == status, output
    assert words in output
    if status:
        assert "rip=" in output  # the black box
        assert f"Firecracker exiting with error. exit_code={status}" in output


def test_serial_output_reaches_standard_output(tmp_path):
    with launch_config(tmp_path, build("spin")) as vm:
        vm.expect("spinning", 30.0)
        vm.process.terminate()
        assert vm.wait() != 0


def test_a_pause_stops_the_guest_and_its_cpu_time(tmp_path):
    """A guest that never exits by itself is parked within the call, and takes no CPU time afterwards."""
    with launch_config(tmp_path, build("spin"), api=True) as vm:
        vm.expect("spinning", 30.0)
        vm.must("PATCH", "/vm", {"state": "Paused"})
        pids = descendants(vm.process.pid)
        before = sum(cpu_ticks(pid) for pid in pids)
        time.sleep(0.5)
        assert sum(cpu_ticks(pid) for pid in pids) - before <= 3
        vm.must("PATCH", "/vm", {"state": "Resumed"})
        deadline = time.monotonic() + 60  # a busy host gives it little
        while sum(cpu_ticks(pid) for pid in pids) - before < 20 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert sum(cpu_ticks(pid) for pid in pids) - before >= 20


def cpu_ticks(pid: int) -> int:
    """Return user and system time of a process in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
