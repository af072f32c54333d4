"""Heartbeats of the running microVM: stalls, and guests that restart or reset as soon as they run."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.harness.machine import Machine
from vmm.cells import heartbeat as heartbeat_module
from vmm.errors import StateError
from vmm.operations import pause as pause_module


def test_a_guest_that_resets_before_the_worker_has_said_that_it_runs_has_run(make, monkeypatch):
    machine = make()

    def resume(worker, answered):
        machine.assembly.ending.guest_reset()  # its exit came first; the answer comes after the end, or never

    monkeypatch.setattr(pause_module, "resume", resume)
    machine.vmm.resume_vm()
    assert machine.vmm.shutdown_exit_code() == 0
    assert machine.vmm.instance_info.state == "Running"
    with pytest.raises(StateError):
        machine.vmm.resume_vm()


@pytest.mark.parametrize("answers_first", [False, True])
def test_a_guest_that_restarts_as_soon_as_it_runs_was_not_paused(make, monkeypatch, answers_first):
    """What its machine was decides whether the one that starts anew runs."""
    machine = make()
    machine.assembly.ending.restarts = True
    driver = machine.vmm._driver
    ask = pause_module.resume

    def resume(worker, answered):
        if answers_first:
            ask(worker, answered)
            machine.controller.serve(lambda: driver.life.current is None)
        machine.assembly.ending.guest_reset()

    monkeypatch.setattr(pause_module, "resume", resume)
    machine.vmm.resume_vm()
    assert machine.vmm.restart_wanted
    assert machine.vmm.instance_info.state == "Running"


@pytest.fixture
def fast_heart(monkeypatch):
    # Long enough that on a busy machine neither the controller takes itself for stopped (two intervals) nor a worker
    # that only waits for its turn for stalled.
    monkeypatch.setattr(heartbeat_module, "INTERVAL_NS", 100_000_000)
    monkeypatch.setattr(heartbeat_module, "STALL_AFTER_NS", 1_000_000_000)


def test_a_stall_is_reported_once_and_so_is_its_end(make, log, fast_heart):
    machine = make()
    machine.vmm.resume_vm()
    os.kill(machine.worker.pid, signal.SIGSTOP)
    machine.controller.serve(lambda: "has not answered" in log())
    waiting = len(machine.worker._replies)
    for _ in range(5):
        beat(machine)
    assert len(machine.worker._replies) <= waiting + 4, "pings pile up"
    assert log().count("has not answered") == 1
    assert machine.vmm.shutdown_exit_code() is None, "slow is not dead"
    os.kill(machine.worker.pid, signal.SIGCONT)
    machine.controller.serve(lambda: "answers again" in log())
    machine.vmm.pause_vm()
    os.kill(machine.worker.pid, signal.SIGSTOP)
    machine.controller.serve(lambda: log().count("has not answered") == 2)
    os.kill(machine.worker.pid, signal.SIGCONT)


def test_a_worker_that_was_stopped_longer_than_commands_wait_recovers(make, log, fast_heart, monkeypatch):
    """Its pings are out of date by then; they must be answered all the same."""
    machine = make()
    monkeypatch.setattr("vmm.cells.commands.COMMAND_TIMEOUT_NS", 20_000_000)
    os.kill(machine.worker.pid, signal.SIGSTOP)
    machine.controller.serve(lambda: "has not answered" in log())
    for _ in range(3):
        beat(machine)
    os.kill(machine.worker.pid, signal.SIGCONT)
    machine.controller.serve(lambda: "answers again" in log())


def test_a_controller_that_did_not_run_itself_reports_no_stall(make, log, fast_heart, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "STALL_AFTER_NS", 500_000_000)
    machine = make()
    machine.vmm.resume_vm()
    beat(machine)
    time.sleep(0.6)  # the controller is stopped
    beat(machine)
    assert "has not answered" not in log()


def beat(machine: Machine) -> None:
    """Let the heart beat a few times."""
    deadline = time.monotonic() + 0.35
    machine.events.run_until(lambda: time.monotonic() > deadline, time.monotonic_ns() + 10**9)


def test_after_the_end_no_heart_beats(make, log, fast_heart):
    machine = make()
    machine.vmm.resume_vm()
    os.kill(machine.worker.pid, signal.SIGSTOP)
    machine.vmm.stop(0)
    deadline = time.monotonic() + 0.2
    machine.events.run_until(lambda: time.monotonic() > deadline, time.monotonic_ns() + 10**9)
    assert "has not answered" not in log()
