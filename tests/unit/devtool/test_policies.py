"""The policy recorder: lines of the kernel's trace, and which rules the calls need."""

from __future__ import annotations

from devtool.policies import Call, Recorder, parse_line, text_of
from jailer.seccomp.names import SYSCALL_NAMES

NUMBERS = {name: number for number, name in SYSCALL_NAMES.items()}
PID = 700


def _call(name: str, *arguments: int, comm: str = "vcpu 0", thread: int = PID) -> Call:
    return Call(comm, thread, PID, NUMBERS[name], (*arguments, *([0] * 6))[:6])


def test_lines() -> None:
    line = "          vcpu 0-700     (    700) [001] .....  8.25: sys_enter: NR 16 (5, ae80, 0, 1, 2, ffffffffffffff80)"
    assert parse_line(line) == Call("vcpu 0", 700, 700, 16, (5, 0xAE80, 0, 1, 2, 0xFFFFFFFFFFFFFF80))
    line = "     ZMQbg/IO/0-712     (    700) [000] .....  8.25: sys_enter: NR 0 (5, 0, 8, 0, 0, 0)"
    assert parse_line(line) == Call("ZMQbg/IO/0", 712, 700, 0, (5, 0, 8, 0, 0, 0))
    for other in (
        "",
        "CPU:0 [LOST 12 EVENTS]",
        line.replace("    700", "-------"),
        line.replace("sys_enter", "sys_exit"),
    ):
        assert parse_line(other) is None


def test_calls_count_for_the_filters_that_are_on() -> None:
    recorder = Recorder()
    recorder.add(_call("sched_getaffinity"))  # no filter of its own yet
    recorder.add(_call("seccomp", 1, 1))
    recorder.add(_call("eventfd2"))
    recorder.add(_call("seccomp", 1, 1))
    recorder.add(_call("ioctl", 5, 0xAE80, comm="fc_vcpu 0", thread=PID + 1))
    assert {rule.syscall for rule in recorder.used["vcpu-setup"]} == {"eventfd2", "seccomp", "ioctl"}
    assert {rule.syscall for rule in recorder.used["vcpu"]} == {"ioctl"}
    assert recorder.used["vmm"] == recorder.used["vmm-setup"] == set()
    recorder.add(_call("exit_group"))
    recorder.add(_call("read"))  # another process with this number
    assert "read" not in {rule.syscall for rule in recorder.used["vcpu"]}


def test_what_no_call_needs_is_told_but_for_what_is_declared() -> None:
    recorder = Recorder(("vcpu",))
    unused = recorder.unused("vcpu")
    assert {"read", "ioctl", "tgkill"} <= {rule.syscall for rule in unused}
    assert "clock_gettime" not in {rule.syscall for rule in unused}
    (kick,) = [rule for rule in unused if rule.syscall == "tgkill"]
    assert text_of(kick) == "allow tgkill if arg0:32 == OWN_PROCESS and arg2:32 == 0x22"
    report = list(recorder.report())
    assert "allow read" in report[report.index("---- vcpu.policy: rules that were not used") :]
