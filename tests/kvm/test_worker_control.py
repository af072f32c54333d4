"""A real worker process on /dev/kvm: pause and resume, saved state, refused commands, every way to end."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from ipc.messages.descriptors import ExitRing, GuestMemory
from ipc.messages.records import BootRegisters, Route
from ipc.messages.vm import SetRoutes, VmChanged
from ipc.messages.worker import (
    Configured,
    DumpCpuConfig,
    DumpedCpuConfig,
    Finish,
    Pause,
    Paused,
    Ping,
    Pong,
    Resume,
    Resumed,
    SavedState,
    SaveState,
)
from tests.harness.run_options import Scale
from tests.harness.workers import ChecksCounts, Controller, nothing_written
from vcpu_worker import state as vcpu_state
from vcpu_worker.kvm import abi


def wait_for_count(worker: Controller, device: ChecksCounts, count: int) -> None:
    worker.wait(lambda: device.count >= count)


@pytest.mark.soak("worker")
def test_pause_and_resume_lose_no_exit(tmp_path: Path, scale: Scale, seed: int):
    """In a tight loop, under a storm of posted and synchronous exits, each with the next count."""
    choose = random.Random(seed)
    device = ChecksCounts()
    with Controller(tmp_path, device, mode="storm") as worker:
        worker.configure()
        for _ in range(scale(1_000, 20_000)):
            worker.resume()
            if choose.random() < 0.5:
                wait_for_count(worker, device, device.count + choose.randrange(50))
            worker.pause()
            at_pause = device.count
            assert worker.serve() == 0, "a parked vCPU has no open exit"
            assert worker.ring.idle
            assert device.count == at_pause
        assert (device.errors, device.failures, worker.events) == ([], [], [])
        assert device.count > 100
        assert worker.finish() == 0


def test_pause_waits_for_the_open_exit(tmp_path: Path):
    """While an exit is not answered the vCPU does not park, and the control thread serves everything else."""
    device = ChecksCounts()
    with Controller(tmp_path, device, mode="storm") as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: not worker.ring.idle, serve_exits=False)
        pause = worker.submit(Pause())
        for _ in range(20):
            ping = worker.submit(Ping())
            assert worker.collect(ping, serve_exits=False) in (Pong("pausing"), Pong("running"))
        assert not worker.has_reply(pause)
        assert isinstance(worker.collect(pause), Paused)
        worker.resume()
        worker.wait(lambda: device.count > 100)
        assert (device.errors, device.failures) == ([], [])


def test_pause_interrupts_a_guest_that_never_exits(tmp_path: Path):
    with Controller(tmp_path, nothing_written, mode="spin") as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: worker.parameters[2] > 0)
        worker.pause()
        count = worker.parameters[2]
        assert worker.request(Ping(), Pong) == Pong("paused")
        assert worker.parameters[2] == count
        worker.resume()
        worker.wait(lambda: worker.parameters[2] > count)
        worker.pause()
        assert worker.counters()["interrupted"] >= 2


def test_pause_and_resume_are_idempotent_and_overlap(tmp_path: Path):
    with Controller(tmp_path, nothing_written, mode="spin") as worker:
        worker.configure()
        worker.pause()
        worker.resume()
        worker.resume()
        pauses = [worker.submit(Pause()) for _ in range(3)]
        assert all(isinstance(worker.collect(pause), Paused) for pause in pauses)
        assert worker.request(Resume(), Resumed) == Resumed()


def test_saved_state_is_complete_and_the_vcpu_goes_on(tmp_path: Path):
    device = ChecksCounts()
    with Controller(tmp_path, device, mode="storm") as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: device.count > 10)
        assert worker.refused(SaveState(0)).code == "worker.state"
        worker.pause()
        saved = worker.request(SaveState(0), SavedState)
        state = vcpu_state.decode(saved.state)
        registers = dict(zip(abi.REGS_NAMES, abi.REGS.unpack(state.regs), strict=True))
        assert registers["rbx"] == device.count
        assert registers["rip"] >> 20 == 1
        assert state.tsc_khz > 0
        assert {msr.register for msr in state.msrs} >= {0x10, 0xC000_0082, 0x2FF, 0x6E0}
        assert state.msrs[-1].register == 0x6E0
        assert len(state.cpuid) > 10
        lint0, lint1 = state.lapic[0x351] & 7, state.lapic[0x361] & 7
        assert (lint0, lint1) == (7, 4), "LINT0 is ExtINT, LINT1 is NMI"
        # Saving changes nothing: a second one differs in nothing but time.
        again = vcpu_state.decode(worker.request(SaveState(0), SavedState).state)
        assert (again.regs, again.sregs, again.xsave, again.events) == (
            state.regs,
            state.sregs,
            state.xsave,
            state.events,
        )
        dumped = worker.request(DumpCpuConfig(0), DumpedCpuConfig)
        assert dumped.cpuid == state.cpuid
        assert worker.refused(SaveState(1)).code == "worker.configuration"
        worker.resume()
        count = device.count
        worker.wait(lambda: device.count > count + 10)
        assert (device.errors, device.failures) == ([], [])


def test_black_box_survives_the_worker(tmp_path: Path):
    device = ChecksCounts()
    with Controller(tmp_path, device, mode="storm") as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: device.count > 10)
        os.kill(worker.pid, signal.SIGKILL)
        assert worker.wait_ended() == -signal.SIGKILL
        worker.serve()
        assert worker.run_page is not None
        registers = abi.REGS.unpack_from(worker.run_page, abi.RUN_SYNC_REGS)
        rbx, rip = registers[1], registers[16]
        assert device.count - 2 <= rbx <= device.count + 2
        assert rip >> 20 == 1


def test_guest_memory_stays_out_of_core_dumps(tmp_path: Path):
    with Controller(tmp_path, nothing_written) as worker:
        worker.configure()
        areas = Path(f"/proc/{worker.pid}/smaps").read_text().split("VmFlags:")
        # The file is read in pieces: an area may be told twice when others come or go meanwhile.
        found = [number for number, area in enumerate(areas) if "/memfd:guest" in area]
        assert found
        assert all("dd" in areas[number + 1].splitlines()[0].split() for number in found)


def configure_with(worker: Controller, **changes: Any):
    worker.greet()
    worker.prepare()
    return worker.refused(worker.configuration()._replace(**changes))


@pytest.mark.parametrize("changes", [{"vcpus": (1,)}, {"vcpus": ()}, {"vcpu_count": 2}])
def test_a_wrong_configuration_is_refused_and_not_repeatable(tmp_path: Path, changes: dict):
    with Controller(tmp_path, nothing_written) as worker:
        assert configure_with(worker, **changes).code == "worker.configuration"
        assert worker.refused(worker.configuration()).code == "worker.state"
        assert worker.refused(Resume()).code == "worker.state"
        assert worker.request(Ping(), Pong) == Pong("failed")
        assert worker.finish() == 0


def test_configuration_without_memory_or_descriptors_is_refused(tmp_path: Path):
    with Controller(tmp_path, nothing_written) as worker:
        worker.greet()
        failed = worker.refused(worker.configuration())
        assert (failed.code, failed.text) == ("worker.configuration", "the guest has no memory yet")
        assert "guest memory" in worker.refused(worker.changes()[0]).text
        worker.descriptor_channel.send(GuestMemory(worker.memory_size), fds=(worker.memory_fd,))
        worker.request(worker.changes()[0], VmChanged)
        assert "device page" in worker.refused(worker.configuration()).text


def test_registers_that_no_processor_accepts_are_refused(tmp_path: Path):
    with Controller(tmp_path, nothing_written) as worker:
        boot: BootRegisters = worker.configuration().boot._replace(cr0=0x8000_0000)  # paging without protection
        failed = configure_with(worker, boot=boot)
        assert (failed.code, "KVM_SET_SREGS" in failed.text) == ("worker.kvm", True)


@pytest.mark.parametrize("message", [Resume(), Pause(), SaveState(0), SetRoutes((Route(5, 0xFEE0_0000, 0x40, False),))])
def test_commands_before_configure_are_refused(tmp_path: Path, message: object):
    with Controller(tmp_path, nothing_written) as worker:
        worker.greet()
        assert worker.refused(message).code == "worker.state"
        assert worker.finish() == 0


def test_what_is_no_command_is_refused(tmp_path: Path):
    with Controller(tmp_path, nothing_written) as worker:
        worker.greet()
        assert worker.refused(Pong("running")).code == "worker.state"


def test_finish_ends_a_worker_whose_exit_nobody_answers(tmp_path: Path):
    with Controller(tmp_path, ChecksCounts(), mode="storm") as worker:
        worker.configure()
        worker.resume()
        worker.wait(lambda: not worker.ring.idle, serve_exits=False)
        worker.collect(worker.submit(Finish()), serve_exits=False)
        assert worker.wait_ended() == 0


@pytest.mark.parametrize("mode", ["spin", "storm", "halt_for_good"])
def test_worker_ends_when_the_controller_is_gone(tmp_path: Path, mode: str):
    with Controller(tmp_path, ChecksCounts(), mode=mode) as worker:
        worker.configure()
        worker.resume()
        worker.request(Ping(), Pong)
        worker.close_descriptor_channel()
        assert worker.wait_ended() == 1


def test_descriptors_that_nobody_asked_for_end_the_worker(tmp_path: Path):
    """More descriptors than any message announces: cut by the kernel, and the controller is not believed any more."""
    with Controller(tmp_path, nothing_written) as worker:
        worker.greet()
        worker.descriptor_channel.send(ExitRing(0), fds=(worker.doorbell,) * 4)
        assert worker.wait_ended() == 1


def test_each_stage_of_the_seal_comes_once_with_all_threads(tmp_path: Path):
    """The first before HELLO, the second before the command after Configure is carried out."""
    verified, tightened = tmp_path / "verified", tmp_path / "tightened"

    def note(record: Path) -> None:
        with record.open("a") as file:
            for task in sorted(Path("/proc/self/task").iterdir()):
                name = (task / "comm").read_text().strip()
                print(task.name, name if name.startswith("fc_vcpu") else "", file=file)  # others name themselves

    def first() -> None:
        note(verified)

    def second() -> None:
        note(tightened)

    with Controller(tmp_path, nothing_written, seal=first, tighten=second) as worker:
        worker.greet()
        worker.request(Ping(), Pong)
        sealed = [line.split(" ", 1) for line in verified.read_text().splitlines()]
        assert [name for _, name in sealed].count("fc_vcpu 0") == 1
        worker.prepare()
        assert not tightened.exists()
        worker.request(worker.configuration(), Configured)
        worker.request(Ping(), Pong)
        assert tightened.read_text() == verified.read_text()
        worker.resume()
        worker.pause()
        assert sorted(os.listdir(f"/proc/{worker.pid}/task")) == sorted(thread for thread, _ in sealed)
        assert worker.finish() == 0


def test_seal_that_fails_ends_the_worker(tmp_path: Path, capfd: pytest.CaptureFixture):
    def seal() -> None:
        raise RuntimeError("a wall differs")

    with Controller(tmp_path, nothing_written, seal=seal) as worker:
        assert worker.wait_ended() == 1
    assert "a wall differs" in capfd.readouterr().err
