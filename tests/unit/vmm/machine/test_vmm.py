"""The running microVM on stand-in workers: operations, ends and their exit codes, heartbeat, black box, clean-up."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress

import pytest

from ipc.exit_ring import KIND_MMIO_WRITE, KIND_PIO_READ, KIND_PIO_WRITE
from ipc.guest_memory import GuestMemory
from ipc.messages.records import MemoryRegion
from ipc.messages.worker import Configured, Paused, Resumed, VcpuExited
from ipc.shared_memory import create_shared
from tests.harness.cells import (
    MEMORY_SIZE,
    Controller,
    StandInWorker,
    configure_message,
    honest,
    open_descriptors,
    run_page,
)
from vmm.cells import exits as exits_module
from vmm.cells import heartbeat as heartbeat_module
from vmm.devices.legacy.console import ConsoleOutput
from vmm.errors import DeviceError, MicrovmEndedError, StateError, VmmError, WorkerError
from vmm.layout import IOAPIC_ADDRESS
from vmm.machine.assembly import Assembly, Console
from vmm.operations import pause as pause_module
from vmm.operations import tables
from vmm.operations.quiescence import QuiescentWorker
from vmm.operations.tables import PAUSE, StepName
from vmm.placement import Placement
from vmm.snapshot import microvm_state

COM1 = 0x3F8
COMMAND = 0x64
RESET = 0xFE


class Machine:
    """A microVM as the builder makes it, on a stand-in worker, with its console on a pipe and the log in a file."""

    def __init__(self, directory, *behaviours) -> None:
        self.controller = Controller(str(directory), *behaviours)
        self.events = self.controller.events
        self.worker = self.controller.worker()
        descriptor = create_shared("guest-memory", MEMORY_SIZE)
        memory = GuestMemory(descriptor, MEMORY_SIZE, (MemoryRegion(0, MEMORY_SIZE, 0),))
        self.reader, writer = os.pipe()
        self.output = ConsoleOutput(writer, owned=True)
        placement = Placement("Split", ((0,),), "test")
        self.assembly = Assembly(self.events, "standin", memory, placement, Console(self.output, -1))
        self.devices = self.assembly.devices
        self.vmm = self.assembly.vmm
        self.controller.greeted()
        ports, mmio = self.devices.ports.windows(), self.devices.mmio.windows()
        self.assembly.prepare(configure_message(ports=ports, mmio=mmio))
        self.assembly.add_worker(self.worker)
        self.assembly.connect()
        os.close(descriptor)
        self.vmm.start_vcpus()

    def resume(self) -> None:
        """Resume a microVM that may end at once."""
        with suppress(VmmError):
            self.vmm.resume_vm()

    def ended(self) -> int:
        """Run until the microVM has stopped; returns its exit code."""
        self.controller.serve(lambda: self.vmm.shutdown_exit_code() is not None)
        code = self.vmm.shutdown_exit_code()
        assert code is not None
        return code

    def console(self) -> bytes:
        os.set_blocking(self.reader, False)
        try:
            return os.read(self.reader, 1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        self.vmm.close()
        self.controller.close()
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1


@pytest.fixture
def make(tmp_path, log):
    machines = []
    directory = tmp_path / "ipc"
    directory.mkdir()

    def make(behaviour=honest) -> Machine:
        machines.append(Machine(directory, behaviour))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


def when_resumed(action):
    """A worker whose vCPU does ``action`` when it is resumed for the first time."""

    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Resumed(), sequence)
        if not hasattr(worker, "resumed"):
            worker.resumed = True  # type: ignore[attr-defined]
            action(worker)

    return lambda worker: worker.serve_with(Resume=resume)


# ---------------------------------------------------------------- operations


def test_states_and_operations(make):
    machine = make()
    vmm = machine.vmm
    assert vmm.instance_info().state == "Paused"
    assert vmm.instance_info().id == "standin"
    vmm.resume_vm()
    vmm.resume_vm()
    assert vmm.instance_info().state == "Running"
    with pytest.raises(StateError, match="save/restore unavailable while running"):
        vmm.save_state()
    vmm.pause_vm()
    vmm.pause_vm()
    assert vmm.instance_info().state == "Paused"
    saved = vmm.save_state()
    assert [vcpu.state for vcpu in saved.vcpus] == [b"state"]
    assert microvm_state.decode(microvm_state.encode(saved)) == saved == vmm.save_state()
    assert (saved.machine.microvm_id, saved.machine.groups) == ("standin", ((0,),))
    assert saved.quiescence == (QuiescentWorker(0, 0, 0, ()),)
    assert [config.vcpu for config in vmm.dump_cpu_config()] == [0]
    assert set(vmm.exit_counters()) == {0}
    assert "vcpu 0: paused" in repr(vmm)
    assert vmm.instance_info is not None
    assert vmm.instance_info() == vmm.instance_info
    assert repr(vmm.vm) == f"<Vm 1 vCPU(s) in 1 worker(s), {MEMORY_SIZE >> 20} MiB>"
    assert (vmm.vm.vcpu_count, vmm.vm.mem_size_mib) == (1, MEMORY_SIZE >> 20)
    assert (vmm.kvm().api_version, vmm.kvm().max_vcpus, vmm.kvm().max_memslots) == (12, 8, 64)


def test_exits_are_served_while_an_operation_waits(make):
    """A worker answers Pause only when its vCPU is parked, and that needs the answer to its open exit."""

    def pause(worker: StandInWorker, sequence: int) -> None:
        for byte in b"hello":
            worker.ring.call(KIND_PIO_WRITE, COM1, 1, byte)
        assert worker.ring.call(KIND_PIO_READ, COM1 + 7, 1, 0) == 0
        worker.send(Paused(1), sequence)

    machine = make(lambda worker: worker.serve_with(Pause=pause))
    machine.vmm.resume_vm()
    machine.vmm.pause_vm()
    assert machine.console() == b"hello"


def test_a_pause_drains_what_was_posted(make):
    def pause(worker: StandInWorker, sequence: int) -> None:
        for count in range(200):
            worker.ring.post(KIND_PIO_WRITE, COM1, 1, count, 1)
        worker.send(Paused(0), sequence)

    machine = make(lambda worker: worker.serve_with(Pause=pause))
    for _ in range(20):
        machine.vmm.resume_vm()
        machine.vmm.pause_vm()
        assert machine.vmm.drained()
        assert machine.console() == bytes(range(200))


def test_a_worker_that_says_paused_with_an_exit_open_is_ended(make, monkeypatch, log):
    soon = [step._replace(deadline_ns=50_000_000) if step.name is StepName.DRAIN else step for step in PAUSE.steps]
    monkeypatch.setattr(tables, "PAUSE", PAUSE._replace(steps=tuple(soon)))

    def pause(worker: StandInWorker, sequence: int) -> None:
        # The controller asks for a route before it executes the write; the answer never comes.
        worker.ring.post(KIND_MMIO_WRITE, IOAPIC_ADDRESS, 4, 0x10 + 2 * 4)
        worker.ring.post(KIND_MMIO_WRITE, IOAPIC_ADDRESS + 0x10, 4, 0x30)
        worker.send(Paused(0), sequence)

    machine = make(lambda worker: worker.serve_with(Pause=pause, SetRoutes=lambda worker, sequence: None))
    machine.vmm.resume_vm()
    with pytest.raises(WorkerError, match="has exits open"):
        machine.vmm.pause_vm()
    assert machine.ended() == 1
    assert "broke the protocol: it says that it is paused" in log()


def test_ctrl_alt_del(make):
    machine = make()
    machine.vmm.resume_vm()
    for _ in range(4):
        machine.vmm.send_ctrl_alt_del()
    with pytest.raises(DeviceError, match="buffer full"):
        machine.vmm.send_ctrl_alt_del()


def test_interrupts_reach_the_worker(make):
    def configure(worker: StandInWorker, sequence: int) -> None:
        worker.take_descriptors(5)
        worker.hand_over_vcpu(0, run_page())
        worker.send(Configured(1), sequence)

    def wait_for_key(worker: StandInWorker) -> None:
        keyboard = worker.received["Interrupt"][0]
        os.set_blocking(keyboard, True)
        os.eventfd_read(keyboard)
        got = [worker.ring.call(KIND_PIO_READ, 0x60, 1, 0) for _ in range(4)]
        assert got == [0x14, 0x11, 0xE0, 0x71]
        worker.ring.call(KIND_PIO_WRITE, COMMAND, 1, RESET)

    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.send(Resumed(), sequence)
        wait_for_key(worker)

    machine = make(lambda worker: worker.serve_with(Configure=configure, Resume=resume))
    machine.vmm.resume_vm()
    machine.vmm.send_ctrl_alt_del()
    assert machine.ended() == 0


# ---------------------------------------------------------------- ends and exit codes


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


# ---------------------------------------------------------------- black box


def test_the_black_box_shows_the_registers_of_the_last_exit(make, log):
    def configure(worker: StandInWorker, sequence: int) -> None:
        worker.take_descriptors(5)
        worker.hand_over_vcpu(0, run_page(reason=6, rip=0xFFFF_FFFF_8123_4567))
        worker.send(Configured(1), sequence)

    machine = make(lambda worker: worker.serve_with(Configure=configure))
    machine.vmm.resume_vm()
    os.kill(machine.worker.pid, signal.SIGKILL)
    machine.ended()
    line = next(line for line in log().splitlines() if "rip=" in line)
    assert "vCPU 0: last exit mmio; rip=0xffffffff81234567 rflags=0x111 rax=0x100 rbx=0x101" in line
    assert "cr0=0x80050033 cr2=0xdead0000 cr3=0x1000 cr4=0x20." in line


def test_what_workers_say_cannot_forge_log_lines(make, log):
    def exit_with_lines(worker: StandInWorker) -> None:
        worker.send(VcpuExited(0, "a\nb", 1, (), "\x1b[2J\nForged line"))
        worker.serve()

    machine = make(when_resumed(exit_with_lines))
    machine.resume()
    assert machine.ended() == 1
    assert not re.search(r"^Forged", log(), re.MULTILINE)
    assert "\x1b" not in log()


# ---------------------------------------------------------------- heartbeat


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
    monkeypatch.setattr("vmm.cells.worker.COMMAND_TIMEOUT_NS", 20_000_000)
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


# ---------------------------------------------------------------- close


def test_close_is_idempotent_and_leaves_no_process(make):
    machine = make()
    machine.vmm.resume_vm()
    pid = machine.worker.pid
    with machine.vmm:
        pass
    machine.vmm.close()
    machine.vmm.close()
    assert not os.path.exists(f"/proc/{pid}")
    assert machine.worker.ended is not None
    assert (machine.worker.ended.status, machine.worker.ended.signal) == (0, 0)


def test_close_writes_the_last_output(make):
    def finish(worker: StandInWorker, sequence: int) -> None:
        for byte in b"last words":
            worker.ring.post(KIND_PIO_WRITE, COM1, 1, byte, 1)
        worker.exit(0)

    machine = make(lambda worker: worker.serve_with(Finish=finish))
    machine.vmm.resume_vm()
    machine.vmm.close()
    assert machine.console() == b"last words"


def test_close_executes_what_nobody_was_woken_for(make, monkeypatch):
    monkeypatch.setattr(exits_module, "NAP_NS", 1000 * 10**9)

    def finish(worker: StandInWorker, sequence: int) -> None:
        for byte in b"last words":
            worker.ring.post(KIND_PIO_WRITE, COM1, 1, byte, 1)
        worker.exit(0)

    def resume(worker: StandInWorker, sequence: int) -> None:
        worker.ring.call(KIND_PIO_WRITE, COM1, 1, ord(">"))  # the executor naps after it
        worker.send(Resumed(), sequence)

    machine = make(lambda worker: worker.serve_with(Finish=finish, Resume=resume))
    machine.vmm.resume_vm()
    assert machine.console() == b">"
    machine.vmm.close()
    assert machine.console() == b"last words"


def test_close_kills_what_does_not_end(make):
    machine = make(lambda worker: worker.serve_with(Finish=lambda worker, sequence: worker.sleep()))
    machine.vmm.resume_vm()
    machine.vmm.close()
    assert machine.worker.ended is not None and machine.worker.ended.signal == signal.SIGKILL


@pytest.mark.soak("devices")
def test_machines_leak_no_descriptors(tmp_path, log, scale):
    def one_round(number: int) -> None:
        machine = Machine(tmp_path, honest)
        machine.vmm.resume_vm()
        if number % 2:
            os.kill(machine.worker.pid, signal.SIGKILL)
            machine.ended()
        machine.close()

    for number in range(4):
        one_round(number)
    before = open_descriptors()
    for number in range(scale(10, 500)):
        one_round(number)
    deadline = time.monotonic() + 60
    while open_descriptors() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_descriptors() <= before
