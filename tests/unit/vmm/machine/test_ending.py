"""How a microVM ends: what was first, what counts more, and the exit code."""

from __future__ import annotations

import os
import signal

import pytest

from ipc.exit_ring import KIND_PIO_WRITE
from tests.harness.cells import (
    StandInWorker,
)
from tests.harness.machine import COMMAND, RESET, when_resumed
from vmm.errors import MicrovmEndedError, StateError, WorkerError


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, 1),
        (signal.SIGSYS, 148),
        (signal.SIGBUS, 149),
        (signal.SIGSEGV, 150),
        (signal.SIGXFSZ, 151),
        (signal.SIGXCPU, 154),
        (signal.SIGHUP, 156),
        (signal.SIGILL, 157),
        (signal.SIGTERM, 1),
        (signal.SIGABRT, 1),
    ],
)
def test_the_signal_that_ended_a_worker_decides_the_exit_code(make, log, number, code):
    machine = make()
    machine.vmm.resume_vm()
    os.kill(machine.worker.pid, number)
    assert machine.ended() == code
    assert signal.Signals(number).name in log()
    for text in ("seccomp wall", "Shutting down VM after intercepting a bad syscall of worker vcpu 0."):
        assert (text in log()) is (number == signal.SIGSYS)
    with pytest.raises(StateError, match="has ended"):
        machine.vmm.pause_vm()


@pytest.mark.parametrize(("status", "code"), [(0, 1), (1, 1), (148, 148), (9, 9)])
def test_a_worker_that_exits_unasked_is_an_error(make, log, status, code):
    machine = make(when_resumed(lambda worker: worker.exit(status)))
    machine.resume()
    assert machine.ended() == code
    assert f"exited with status {status}" in log()


@pytest.mark.parametrize(("reason", "code"), [("shutdown", 1), ("system-event", 0), ("internal-error", 1)])
def test_a_vcpu_that_leaves_its_run_loop(make, log, reason, code):
    machine = make(when_resumed(lambda worker: worker.vcpu_exited(reason, code)))
    machine.resume()
    assert machine.ended() == code
    assert f"left its run loop: {reason}" in log()
    assert ("rip=" in log()) is bool(code)


def test_a_guest_that_resets_itself(make):
    machine = make(when_resumed(lambda worker: worker.ring.call(KIND_PIO_WRITE, COMMAND, 1, RESET)))
    machine.resume()
    assert machine.ended() == 0


def test_what_a_guest_does_after_its_reset_does_not_count(make, log):
    """Until its worker ends it runs on, into a triple fault as a rule."""

    def reset(worker: StandInWorker) -> None:
        worker.ring.call(KIND_PIO_WRITE, COMMAND, 1, RESET)
        worker.vcpu_exited("shutdown", 1)
        worker.serve()

    machine = make(when_resumed(reset))
    machine.resume()
    assert machine.ended() == 0
    machine.controller.serve(lambda: machine.worker.vcpu_exit is not None)
    machine.vmm.close()
    assert machine.vmm.shutdown_exit_code() == 0
    assert "rip=" not in log()


def test_the_first_error_counts_and_an_error_counts_more_than_success(make):
    vmm = make().vmm
    vmm.stop(0)
    vmm.stop(148)
    vmm.stop(1)
    vmm.stop(0)
    assert vmm.shutdown_exit_code() == 148
    vmm.clear_shutdown_exit_code()
    assert vmm.shutdown_exit_code() is None


def test_a_breach_after_the_reset_is_an_error(make):
    def reset_and_breach(worker: StandInWorker) -> None:
        worker.ring.call(KIND_PIO_WRITE, COMMAND, 1, RESET)
        worker.hello()
        worker.sleep()

    machine = make(when_resumed(reset_and_breach))
    machine.resume()
    machine.controller.serve(lambda: machine.vmm.shutdown_exit_code() == 1)


def test_a_scribbled_ring_is_a_breach(make, log):
    def scribble(worker: StandInWorker) -> None:
        worker.ring.words[8] = 1 << 63
        os.eventfd_write(worker.received["ExitRing"][1], 1)
        worker.sleep()

    machine = make(when_resumed(scribble))
    machine.resume()
    assert machine.ended() == 1
    assert "broke the protocol: exit ring" in log()


def test_an_operation_during_which_the_worker_dies(make):
    def pause(worker: StandInWorker, sequence: int) -> None:
        os.kill(os.getpid(), signal.SIGILL)

    machine = make(lambda worker: worker.serve_with(Pause=pause))
    machine.vmm.resume_vm()
    with pytest.raises(WorkerError, match="SIGILL"):
        machine.vmm.pause_vm()
    assert machine.vmm.shutdown_exit_code() == 157
    vmm = machine.vmm
    for operation in (vmm.resume_vm, vmm.pause_vm, vmm.save_state, vmm.send_ctrl_alt_del):
        with pytest.raises(StateError, match="has ended"):
            operation()


def test_an_operation_during_which_the_guest_ends(make):
    def pause(worker: StandInWorker, sequence: int) -> None:
        worker.vcpu_exited("shutdown", 1)
        worker.serve()

    machine = make(lambda worker: worker.serve_with(Pause=pause))
    machine.vmm.resume_vm()
    with pytest.raises(MicrovmEndedError, match="shutdown"):
        machine.vmm.pause_vm()
