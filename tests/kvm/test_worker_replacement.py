"""One real worker goes on for another: what it refuses, and that the whole state of a vCPU arrives."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipc.messages.records import Route
from ipc.messages.replacement import (
    HandedOver,
    HandOver,
    LoadState,
    RollBack,
    RolledBack,
    StateLoaded,
    TakenOver,
    TakeOver,
)
from ipc.messages.vm import SetRoutes
from ipc.messages.worker import Ping, Pong, Resume, SavedState, SaveState
from tests.harness.workers import ChecksCounts, Controller
from vcpu_worker import state as vcpu_state
from vcpu_worker.cpu.msr import IA32_TSC, IA32_TSC_DEADLINE
from vcpu_worker.kvm import abi


def successor_configured(worker: Controller) -> None:
    """Configure it to go on for another one."""
    configuration = worker.configuration
    worker.configuration = lambda: configuration()._replace(resumes_other=True)  # type: ignore[method-assign]
    worker.configure()


def says(worker: Controller) -> str:
    return worker.request(Ping(), Pong).state


def saved_while_running(worker: Controller) -> SavedState:
    """Let the guest run for a while, park it, return its state."""
    worker.configure()
    worker.resume()
    worker.wait(lambda: worker.entries > 100)
    worker.pause()
    return worker.request(SaveState(0), SavedState)


def test_the_whole_state_arrives(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with (
        Controller(first, ChecksCounts(), number=1 << 30) as predecessor,
        Controller(second, ChecksCounts()) as successor,
    ):
        saved = saved_while_running(predecessor)
        successor_configured(successor)
        assert says(successor) == "awaiting-state"
        successor.request(LoadState(0, saved.version, saved.state), StateLoaded)
        successor.request(TakeOver((), (), (), (), True), TakenOver)
        assert says(successor) == "paused"
        before = vcpu_state.decode(saved.state)
        after = vcpu_state.decode(successor.request(SaveState(0), SavedState).state)
        for name in ("mp_state", "regs", "sregs", "sregs2", "debugregs", "xcrs", "lapic", "cpuid", "tsc_offset"):
            assert getattr(after, name) == getattr(before, name), name
        assert after.xsave[:512] == before.xsave[:512]
        moving = (IA32_TSC, IA32_TSC_DEADLINE)
        assert [each for each in after.msrs if each.register not in moving] == [
            each for each in before.msrs if each.register not in moving
        ]
        clock_before, _, _, realtime_before, _ = abi.CLOCK_DATA.unpack(before.clock)
        clock_after, _, _, realtime_after, _ = abi.CLOCK_DATA.unpack(after.clock)
        drift = (clock_after - clock_before) - (realtime_after - realtime_before)
        assert abs(drift) < 10_000_000, "kvmclock has not gone on with the time of day"


def test_a_predecessor_that_has_handed_over_does_not_run(tmp_path: Path) -> None:
    with Controller(tmp_path, ChecksCounts(), number=1 << 30, interrupts=(4,)) as worker:
        saved_while_running(worker)
        worker.collect(worker.submit(SetRoutes((Route(4, 0xFEE0_0000, 0x40, False),))))
        assert worker.request(HandOver(), HandedOver) == ((), ())
        assert worker.request(HandOver(), HandedOver) == ((), ())
        assert says(worker) == "handed-over"
        assert worker.refused(Resume()).text == "the worker is handed-over: it cannot resume"
        worker.request(SaveState(0), SavedState)
        worker.request(RollBack(), RolledBack)
        worker.request(RollBack(), RolledBack)
        entries = worker.entries
        worker.resume()
        worker.request(RollBack(), RolledBack)  # it may come late
        worker.wait(lambda: worker.entries > entries)
        assert worker.refused(HandOver()).code == "worker.state"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with (
        Controller(first, ChecksCounts(), number=1 << 30) as predecessor,
        Controller(second, ChecksCounts()) as successor,
    ):
        saved = saved_while_running(predecessor)
        good = vcpu_state.decode(saved.state)
        assert predecessor.refused(LoadState(0, 1, saved.state)).code == "worker.state"
        assert predecessor.refused(TakeOver((), (), (), (), True)).code == "worker.state"
        successor_configured(successor)
        assert successor.refused(Resume()).text == "the worker is awaiting-state: it cannot resume"
        assert "the state of a vCPU is missing" in successor.refused(TakeOver((), (), (), (), True)).text
        for wrong, text in (
            (LoadState(1, 1, saved.state), "does not run vCPU 1"),
            (LoadState(0, 2, saved.state), "has version 2"),
            (LoadState(0, 1, saved.state[:-1]), "not a vCPU state"),
            (LoadState(0, 1, vcpu_state.encode(good._replace(vcpu=1))), "the state of vCPU 1"),
            (LoadState(0, 1, vcpu_state.encode(good._replace(tsc_khz=1))), "the TSC runs at"),
            (LoadState(0, 1, vcpu_state.encode(good._replace(has_tsc_offset=False))), "time stamp counter"),
        ):
            assert text in successor.refused(wrong).text
        assert successor.refused(Resume()).code == "worker.state"


@pytest.mark.parametrize("known", [True, False])
def test_a_successor_writes_nothing_into_the_ring_before_it_runs(tmp_path: Path, known: bool) -> None:
    with Controller(tmp_path, ChecksCounts()) as successor:
        successor.greet()
        words = memoryview(successor._ring_map).cast("Q")
        words[9] = 77  # its predecessor waits for an answer
        successor.prepare()
        successor.collect(successor.submit(successor.configuration()._replace(resumes_other=known)))
        assert words[9] == (77 if known else 0)
        words.release()
