"""The running microVM on stand-in workers: its operations, and how it is closed."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ipc.exit_ring import KIND_MMIO_WRITE, KIND_PIO_READ, KIND_PIO_WRITE
from ipc.messages.worker import Configured, Paused, Resumed
from tests.harness.cells import (
    MEMORY_SIZE,
    StandInWorker,
    honest,
    open_descriptors,
    run_page,
)
from tests.harness.machine import COM1, COMMAND, RESET, Machine
from vmm.cells import exits as exits_module
from vmm.errors import DeviceError, StateError, WorkerError
from vmm.layout import IOAPIC_ADDRESS
from vmm.operations import tables
from vmm.operations.quiescence import QuiescentWorker
from vmm.operations.tables import PAUSE, StepName
from vmm.snapshot import microvm_state


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
        worker.take_descriptors(6)
        worker.hand_over_vcpu(0, run_page())
        worker.send(Configured(1), sequence)

    def wait_for_key(worker: StandInWorker) -> None:
        keyboard = worker.received["Interrupt"][1]
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
