"""However a part of a microVM ends, the rest ends or reports within a second, and nothing undocumented is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from base.faults import FAULT_POINTS
from lab.client import ClientError
from tests.harness.jail import (
    JAILER,
    PATIENCE_S,
    PROMISE_S,
    children,
    descriptors,
    id_of,
    is_alive,
    microvm,
    status,
    wait_for,
)
from tests.harness.jail_left import after_the_janitor, janitors, remove_shared_parents
from tests.harness.run_options import NoLeftovers, Scale

ALL = ("supervisor", "vmm", "vcpu 0")
SUPERVISOR_POINTS = [point for point in FAULT_POINTS if point.startswith("supervisor.")]


def _all_gone(pids: list[int]) -> bool:
    return not any(map(is_alive, pids))


def _childless(pid: int) -> bool:
    return not children(pid)


def _all_in(states: str, pids: list[int]) -> bool:
    return all(status(pid)["State"][0] in states for pid in pids)


def _left(base: Path) -> list[str]:
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


#: What stays of a microVM without --cleanup (docs/jailer.md), besides the directory that all of one program share.
DOCUMENTED = (
    "", "/root", "/root/dev", "/root/dev/kvm", "/root/dev/net", "/root/dev/net/tun", "/root/dev/urandom",
    "/root/dev/userfaultfd", "/root/firecracker", "/root/firecracker.pid", "/root/kernel", "/root/run",
    "/root/run/cellblock", "/root/run/firecracker.socket",
)  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_visible_process(base: Path, no_leftovers: NoLeftovers, number: signal.Signals) -> None:
    with no_leftovers(names=(id_of(base),)), microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        os.kill(jailed.pid, number)
        wait_for(lambda: _all_gone(list(cells.values())), "the end of every cell", PROMISE_S)
        code = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 156}[number]
        assert jailed.process.wait() == (code if number == signal.SIGHUP else -number)
        assert jailed.last_words().endswith(f"Firecracker exiting with error. exit_code={code}")


def test_supervisor_killed(base: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(names=(id_of(base),)), microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        os.kill(cells["supervisor"], signal.SIGKILL)
        wait_for(lambda: _all_gone(list(cells.values())), "the end of every cell", PROMISE_S)


def test_controller_killed(base: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(names=(id_of(base),)), microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        os.kill(cells["vmm"], signal.SIGKILL)
        wait_for(lambda: _all_gone(list(cells.values())), "the end of every cell", PROMISE_S)
        assert jailed.process.wait() == 1
        lines = jailed.log().splitlines()
        assert f"vmm (pid {cells['vmm']}) was ended by signal 9 (SIGKILL)" in lines[-2]
        assert lines[-1].endswith("Firecracker exiting with error. exit_code=1")


def test_worker_killed_is_reported(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        os.kill(cells["vcpu 0"], signal.SIGKILL)
        line = f"vcpu 0 (pid {cells['vcpu 0']}) was ended by signal 9 (SIGKILL)"
        wait_for(lambda: line in jailed.log(), "the report", PROMISE_S)
        # A guest without its only vCPU is over; the controller decides so.
        wait_for(lambda: _all_gone(list(cells.values())), "the end of every cell")


def test_without_the_death_signal_cells_outlive_their_supervisor(base: Path) -> None:
    """Shows that the death signal, which cannot be read back, is what ends them."""
    with microvm(base, "--without", "death-signal") as jailed:
        jailed.add_guest("spin")
        jailed.start().wait_up()
        controller = children(jailed.pid)["vmm"]
        os.kill(controller, signal.SIGSTOP)  # else it ends by itself when its channel closes
        os.kill(jailed.pid, signal.SIGKILL)
        jailed.process.wait()
        time.sleep(0.2)
        assert status(controller)["State"].startswith("T")
        os.kill(controller, signal.SIGKILL)
    with microvm(base, microvm_id=id_of(base, "with")) as jailed:
        jailed.add_guest("spin")
        jailed.start().wait_up()
        controller = children(jailed.pid)["vmm"]
        os.kill(controller, signal.SIGSTOP)
        os.kill(jailed.pid, signal.SIGKILL)
        wait_for(lambda: not is_alive(controller), "the end of the controller", PROMISE_S)


@pytest.mark.slow
@pytest.mark.soak("jail")
def test_kills_at_random_moments(base: Path, no_leftovers: NoLeftovers, scale: Scale, seed: int) -> None:
    """kill -9 of controller, worker or supervisor at any moment from the launch on; nothing is left with --cleanup."""
    choice = random.Random(seed)
    options = ("--cleanup", "--cgroup", "pids.max=50")
    for round_number in range(scale(12, 150)):
        victim = ALL[round_number % 3]
        delay = choice.uniform(0.0, 0.4)
        with no_leftovers(base, names=(id_of(base),)), microvm(base, *options) as jailed:
            jailed.add_guest("spin")
            jailed.start()
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline:
                time.sleep(0.001)
            started = jailed.process.pid
            pid = {"supervisor": started, **children(started)}.get(victim, started)
            os.kill(pid, signal.SIGKILL)
            if victim == "vcpu 0" and pid != started:
                wait_for(partial(_all_gone, [pid]), "the worker's end")
                if is_alive(started):
                    os.kill(started, signal.SIGTERM)
            jailed.process.wait(10)
            wait_for(partial(_childless, started), "the end of every cell", PROMISE_S)
            after_the_janitor(jailed)


@pytest.mark.parametrize("point", SUPERVISOR_POINTS)
def test_supervisor_killed_at_each_step(base: Path, no_leftovers: NoLeftovers, point: str) -> None:
    with no_leftovers(base, names=(id_of(base),)):
        with microvm(base, "--cleanup", "--cgroup", "pids.max=50", "--arm-fault", f"{point}=kill") as jailed:
            jailed.add_guest("spin")
            jailed.start()
            if point == "supervisor.memory":
                jailed.wait_up()
                jailed.api("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
                jailed.api("PUT", "/boot-source", {"kernel_image_path": "/kernel"})
                with suppress(OSError, ClientError):  # the controller may die before it answers
                    assert jailed.api("PUT", "/actions", {"action_type": "InstanceStart"}).status == 400
            assert jailed.process.wait(10) == -signal.SIGKILL
            wait_for(lambda: not jailed.directory.exists(), "the janitor")
        remove_shared_parents(base)


@pytest.mark.parametrize("point", ["cell.forked", "cell.confined", "cell.filtered", "cell.sealed"])
def test_supervisor_killed_while_a_worker_is_at_a_step_of_its_start(
    base: Path, no_leftovers: NoLeftovers, point: str
) -> None:
    """Before its death signal is set, the worker has to notice by itself that it is alone."""
    options = ("--arm-fault", f"{point}=delay,ms=300,after=1")
    with no_leftovers(names=(id_of(base),)), microvm(base, *options) as jailed:
        jailed.add_guest("spin")
        jailed.start()
        cells = wait_for(lambda: len(found := children(jailed.process.pid)) == 2 and found, "the worker's fork")
        os.kill(jailed.process.pid, signal.SIGKILL)
        wait_for(lambda: _all_gone(list(cells.values())), "the end of every cell", PROMISE_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_during_the_launch(base: Path, no_leftovers: NoLeftovers, number: signal.Signals) -> None:
    """It ends the microVM once it is there, instead of a launch half-way."""
    with no_leftovers(base, names=(id_of(base),)), microvm(base, "--cleanup") as jailed:
        jailed.start()
        wait_for(
            lambda: "SigBlk:\t" in (text := _status_text(jailed.process.pid)) and _blocks(text, number), "the launch"
        )
        os.kill(jailed.process.pid, number)
        assert jailed.process.wait(PATIENCE_S) == {signal.SIGTERM: -signal.SIGTERM, signal.SIGHUP: 156}[number]
        wait_for(lambda: not janitors(base), "the janitor")
        remove_shared_parents(base)


def _status_text(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def _blocks(text: str, number: int) -> bool:
    line = next(line for line in text.splitlines() if line.startswith("SigBlk:"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_caller_that_ignores_sigchld(base: Path) -> None:
    with microvm(base, "--cleanup") as jailed:
        jailed.add_guest("spin")
        jailed.start(preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        os.kill(cells["vmm"], signal.SIGKILL)
        assert jailed.process.wait(PATIENCE_S) == 1
        assert "vmm (pid " in jailed.log()


def test_caller_without_standard_descriptors(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.add_guest("spin")
        jailed.command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *jailed.command]
        jailed.start()
        jailed.boot()
        for name, pid in jailed.wait_cells(*ALL).items():
            found = descriptors(pid)
            assert [found[each] for each in range(2)] == ["/dev/null"] * 2, name
            assert found[2].startswith("pipe:") if name != "supervisor" else found[2] == "/dev/null", name
        assert jailed.stop() == -signal.SIGTERM


def test_stopped_and_continued(base: Path) -> None:
    """SIGSTOP and SIGCONT interrupt poll in every cell; with the filter on, it has to be restarted."""
    with microvm(base) as jailed:
        jailed.boot()
        cells = jailed.wait_cells(*ALL)
        for _ in range(3):
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for pid in cells.values():
                    os.kill(pid, number)
                state = "T" if number == signal.SIGSTOP else "RSD"
                wait_for(partial(_all_in, state, list(cells.values())), "the signal")
        assert jailed.api("PATCH", "/vm", {"state": "Paused"}).status == 204
        assert jailed.api("PATCH", "/vm", {"state": "Resumed"}).status == 204
        assert jailed.stop() == -signal.SIGTERM
        assert "seccomp" not in jailed.log()


def test_purge_removes_the_cgroups_of_workers(base: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(base, names=(id_of(base),)):
        for _ in range(2):  # what an earlier launch has left is no obstacle
            with microvm(base, "--vcpu-cgroup", "cpu.shares=300") as jailed:
                jailed.boot()
                jailed.stop()
            assert Path(f"/sys/fs/cgroup/cpu/firecracker/{id_of(base)}/vcpu-31").is_dir()
            shutil.rmtree(base / "firecracker")
        purge = [str(JAILER), "--purge", id_of(base), "--chroot-base-dir", str(base)]
        subprocess.run(purge, check=True, capture_output=True)
        remove_shared_parents(base)


def test_what_stays_and_purge(base: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(base, names=(id_of(base),)):
        with microvm(base, "--cgroup", "pids.max=50") as jailed:
            jailed.boot()
            purge = [str(JAILER), "--purge", id_of(base), "--chroot-base-dir", str(base)]
            refused = subprocess.run(purge, check=False, capture_output=True, text=True)
            assert refused.returncode == 1
            assert refused.stderr == f"the microVM is still running (pid {jailed.pid} as its caller sees it)\n"
            assert jailed.api("GET", "/").status == 200
            jailed.stop()
        own = f"firecracker/{jailed.id}"
        documented = {"firecracker", *(f"{own}{path}" for path in DOCUMENTED)}
        assert set(_left(base)) <= documented
        assert documented - set(_left(base)) <= {
            f"{own}/root/run/firecracker.socket",  # the controller removes it in an orderly end
            f"{own}/root/dev/userfaultfd",  # if the host has it
        }
        cgroup = Path("/sys/fs/cgroup/pids/firecracker") / jailed.id
        assert cgroup.is_dir()
        done = subprocess.run(purge, check=True, capture_output=True, text=True)
        directory = base / "firecracker" / jailed.id
        assert done.stdout.splitlines() == [f"removed {directory}", f"removed {cgroup}"]
        again = subprocess.run(purge, check=True, capture_output=True, text=True)
        assert again.stdout == f"nothing is left of {jailed.id} ({directory})\n"
        remove_shared_parents(base)


def test_cleanup_removes_exactly_its_own(base: Path, no_leftovers: NoLeftovers) -> None:
    precious = base.parent / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep me")
    with no_leftovers(base, names=(id_of(base),)):
        with (
            microvm(base, "--cleanup", "--cgroup", "pids.max=50", microvm_id=id_of(base, "first")) as first,
            microvm(base, "--cleanup", "--cgroup", "pids.max=50", microvm_id=id_of(base, "second")) as second,
        ):
            first.boot()
            second.boot()
            # Links and mounts inside the jail root must not lead the janitor out.
            (first.root / "link").symlink_to(precious)
            (first.root / "mounted").mkdir()
            subprocess.run(["mount", "--bind", precious, first.root / "mounted"], check=True)
            first.stop()
            wait_for(lambda: sorted(os.listdir(first.root)) == ["mounted"], "the janitor")
            subprocess.run(["umount", first.root / "mounted"], check=True)
            assert (precious / "file").read_text() == "keep me"
            assert second.api("GET", "/").status == 200
            assert Path("/sys/fs/cgroup/pids/firecracker", second.id).is_dir()
            subprocess.run([JAILER, "--purge", first.id, "--chroot-base-dir", base], check=True, capture_output=True)
            second.stop()
            wait_for(lambda: not second.directory.exists(), "the janitor")
        cgroups = Path("/sys/fs/cgroup")
        wait_for(lambda: not list(cgroups.glob(f"*/firecracker/{second.id}")), "the cgroups to be removed")
        remove_shared_parents(base)


def test_the_janitor_is_confined(base: Path) -> None:
    with microvm(base, "--cleanup") as jailed:
        jailed.boot()
        jailed.wait_cells(*ALL)
        found = janitors(base)
        assert len(found) == 1
        state = wait_for(lambda: (s := status(found[0]))["Seccomp"] == "2" and s, "the janitor's filter")
        assert int(state["CapEff"], 16) == 1 << 1 | 1 << 3  # CAP_DAC_OVERRIDE, CAP_FOWNER
        assert state["NoNewPrivs"] == "1"
        assert "pids:/firecracker" not in Path(f"/proc/{found[0]}/cgroup").read_text()
        jailed.stop()
        wait_for(lambda: not is_alive(found[0]), "the janitor's end")
