"""Fault points: what can be armed, when, and what they do."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base import faults
from base.errors import FaultSpecError
from tests.harness.processes import Child


@pytest.fixture(autouse=True)
def disarmed(monkeypatch):
    monkeypatch.setattr(faults, "_armed", {})
    monkeypatch.setattr(faults, "_frozen", False)


@pytest.mark.parametrize(
    "specification",
    [
        "",
        "=",
        "=kill",
        "vmm.start",
        "vmm.start=",
        "vmm.start=explode",
        "vmm.nothing=kill",
        "VMM.START=kill",
        " vmm.start=kill",
        "vmm.start=kill ",
        "vmm.start=drop",
        "vcpu.hello=corrupt",
        "vmm.start=kill,",
        "vmm.start=kill,after",
        "vmm.start=kill,after=",
        "vmm.start=kill,after=-1",
        "vmm.start=kill,after=1.5",
        "vmm.start=kill,after=0x10",
        "vmm.start=kill,after=1 ",
        "vmm.start=kill,after=1000000000",
        "vmm.start=kill,point=1",
        "vmm.start=kill,visits=1",
        "vmm.start=kill;after=1",
    ],
)
def test_what_cannot_be_understood_is_refused(specification):
    with pytest.raises(FaultSpecError):
        faults.parse(specification)
    with pytest.raises(FaultSpecError):
        faults.arm((specification,))
    assert faults._armed == {}


def test_the_error_says_what_is_possible():
    with pytest.raises(FaultSpecError, match=r"vcpu\.hello"):
        faults.parse("nowhere=kill")
    with pytest.raises(FaultSpecError, match="delay, exit, kill, stop"):
        faults.parse("vmm.start=explode")
    with pytest.raises(FaultSpecError, match="after=N, count=N, ms=N, seed=N"):
        faults.parse("vmm.start=kill,when=now")


@given(st.text(max_size=60))
def test_any_text_gives_a_fault_or_the_error(text):
    for specification in (text, f"vmm.start={text}", f"channel.send=corrupt,{text}", f"channel.send=delay,ms={text}"):
        try:
            fault = faults.parse(specification)
        except FaultSpecError:
            continue
        assert fault.point in faults.FAULT_POINTS
        assert min(fault.after, fault.count, fault.ms, fault.seed) >= 0


@pytest.mark.parametrize("point", faults.FAULT_POINTS)
def test_every_point_takes_the_actions_of_its_kind(point):
    for action in faults.PROCESS_ACTIONS:
        fault = faults.parse(f"{point}={action},after=3,count=2,ms=7,seed=9")
        assert (fault.point, fault.action, fault.after, fault.count, fault.ms, fault.seed) == (
            point,
            action,
            3,
            2,
            7,
            9,
        )
    for action in faults.CHANNEL_ACTIONS:
        if point in ("channel.send", "channel.receive"):
            assert faults.parse(f"{point}={action}").action == action
        else:
            with pytest.raises(FaultSpecError):
                faults.parse(f"{point}={action}")


def acting(visits: int, point: str = "channel.send") -> list[int]:
    """Return at which visits (from 1) a channel fault acts."""
    return [number for number in range(1, visits + 1) if faults.visit(point) is not None]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", [1]),
        (",count=3", [1, 2, 3]),
        (",after=2", [3]),
        (",after=2,count=2", [3, 4]),
        (",count=0", [1, 2, 3, 4, 5, 6]),
        (",after=4,count=0", [5, 6]),
        (",after=6", []),
    ],
)
def test_after_and_count(options, expected):
    faults.arm((f"channel.send=drop{options}",))
    assert acting(6) == expected


def test_two_faults_at_one_point_count_the_same_visits():
    faults.arm(("channel.send=drop,after=1,count=2", "channel.send=corrupt,after=3"))
    actions = [fault.action if (fault := faults.visit("channel.send")) else None for _ in range(5)]
    assert actions == [None, "drop", "drop", "corrupt", None]


def test_a_process_action_and_a_channel_action_at_one_point():
    faults.arm(("channel.send=drop", "channel.send=delay,ms=0"))
    fault = faults.visit("channel.send")
    assert fault is not None
    assert fault.action == "drop"


def test_other_points_are_not_affected():
    faults.arm(("channel.send=drop,count=0",))
    assert acting(3, "channel.receive") == []
    assert faults.visit("vmm.start") is None


def test_an_unknown_point_in_the_product_is_a_bug():
    with pytest.raises(AssertionError):
        faults.visit("channel.sent")


def test_visits_of_a_child_are_counted_for_it():
    """A parent that forks cell after cell counts what each of them visits."""
    faults.arm(("cell.forked=delay,ms=0,after=2",))
    for expected in (1, 2, 3):
        faults.count("cell.forked")
        faults.count("vmm.start")
        assert faults._armed["cell.forked"][0].visits == expected


def test_nothing_can_be_armed_after_freeze():
    faults.arm(("channel.send=drop",))
    faults.freeze()
    with pytest.raises(FaultSpecError, match="jailer"):
        faults.arm(("vmm.start=kill",))
    faults.freeze()
    assert acting(2) == [1]  # what was armed before still acts


def test_freeze_holds_in_children():
    def arm() -> str:
        try:
            faults.arm(("vmm.start=kill",))
        except FaultSpecError:
            return "refused"
        return "armed"

    with Child(arm) as child:
        assert child.join() == "armed"
    faults.freeze()
    with Child(arm) as child:
        assert child.join() == "refused"


def test_arming_is_all_or_nothing():
    with pytest.raises(FaultSpecError):
        faults.arm(("vmm.start=kill", "nowhere=kill"))
    assert faults._armed == {}


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGKILL), ("crash", -signal.SIGSEGV), ("exit", 1)])
def test_ending_the_process(action, status):
    faults.arm((f"vmm.start={action},after=1",))

    def visit() -> str:
        faults.visit("vmm.start")
        os.write(writer, b"1")
        faults.visit("vmm.start")
        os.write(writer, b"2")
        return "alive"

    reader, writer = os.pipe()
    with Child(visit) as child:
        assert child.wait() == status
    os.close(writer)
    assert os.read(reader, 2) == b"1"
    os.close(reader)


def test_stopping_the_process():
    faults.arm(("vmm.start=stop",))
    with Child(lambda: faults.visit("vmm.start") is None) as child:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == signal.SIGSTOP
        child.kill(signal.SIGCONT)
        assert child.join() is True


def test_signals_can_be_sent_by_somebody_else(monkeypatch):
    monkeypatch.setattr(faults, "_send_signal", faults._send_signal)
    sent: list[int] = []
    faults.signal_by(sent.append)
    faults.arm(("vmm.start=stop", "vcpu.hello=kill"))
    faults.visit("vmm.start")
    faults.visit("vcpu.hello")
    assert sent == [signal.SIGSTOP, signal.SIGKILL]


def test_delay_sleeps(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    faults.arm(("vmm.start=delay,ms=250", "vcpu.hello=delay"))
    faults.visit("vmm.start")
    faults.visit("vcpu.hello")
    faults.visit("vcpu.hello")
    assert slept == [0.25, 0.1]


@given(st.binary(max_size=200), st.integers(0, 999_999_999), st.integers(1, 50))
def test_mangle(frame, seed, visits):
    truncate, corrupt = faults.parse("channel.send=truncate"), faults.parse(f"channel.send=corrupt,seed={seed}")
    corrupt.visits = visits
    assert faults.mangle(truncate, frame) == frame[: len(frame) // 2]
    changed = faults.mangle(corrupt, frame)
    assert changed == faults.mangle(corrupt, frame)
    assert len(changed) == len(frame)
    assert sum(a != b for a, b in zip(changed, frame, strict=True)) == (1 if frame else 0)


def test_inert_points_cost_next_to_nothing():
    """No clock: a visit of an unarmed point allocates nothing and calls nothing."""
    import sys

    called: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename == faults.__file__:  # the garbage collector's hooks may run in between
            called.append(f"{event} {getattr(argument, '__name__', '')}")

    visit = faults.visit
    sys.setprofile(profile)
    result = visit("channel.send")
    sys.setprofile(None)
    assert result is None
    assert called == ["call ", "return "]
    before = sys.getallocatedblocks()
    for _ in range(1000):
        visit("channel.send")
    assert sys.getallocatedblocks() - before < 20
