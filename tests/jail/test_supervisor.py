"""The supervisor with stand-in roles: its protocol, its bounds, the walls' verification, and what ends mean."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from ipc.launch_plan import MAX_DEVICE_CELLS, MAX_MEMORY_BYTES, MAX_WORKERS
from jailer import landlock
from tests.harness.jail import JailedMicrovm, children, descriptors, id_of, stand_in, status, wait_for
from tests.harness.run_options import NoLeftovers


def _lines(jailed: JailedMicrovm) -> list[str]:
    return [line.removeprefix("stand-in: ") for line in jailed.output().splitlines() if line.startswith("stand-in: ")]


def _wait_line(jailed: JailedMicrovm, line: str) -> None:
    wait_for(lambda: line in _lines(jailed), lambda: f"{line!r}: {jailed.describe()}")


def test_requests_within_and_beyond_the_plan(base: Path) -> None:
    jailed = stand_in(base, "greedy")
    assert jailed.run() == 0, jailed.output()
    answers = [line for line in _lines(jailed) if "->" in line]
    assert answers == [
        "first -> Spawned",
        "Spawn 0 -> Failed supervisor.exists",
        "Spawn 0 -> Failed supervisor.exists",
        "Spawn 0 -> Spawned ",
        "Spawn 0 -> Failed supervisor.exists",
        f"Spawn {MAX_WORKERS - 1} -> Spawned ",
        "SignalCell 0 -> Failed supervisor.signal",
        "SignalCell 7 -> Failed supervisor.signal",
        "SignalCell 0 -> Failed supervisor.signal",
        "CreateMemory 4096 -> MemoryCreated",
        f"CreateMemory {MAX_MEMORY_BYTES} -> MemoryCreated",
    ]


@pytest.mark.parametrize(
    ("options", "growing"),
    [((), "Operation not permitted"), (("--resource-limit", "fsize=1048576"), "File too large")],
)
def test_memory_is_sealed(base: Path, options: tuple[str, ...], growing: str) -> None:
    jailed = stand_in(base, "memory", *options)
    assert jailed.run() == 0, jailed.output()
    lines = [line for line in _lines(jailed) if "memory" in line or "resize" in line]
    refused = ["resize refused: Operation not permitted", f"resize refused: {growing}"]
    assert lines == [*refused, f"memory of {8 << 20}"] * 3


def test_signals_to_workers(base: Path) -> None:
    jailed = stand_in(base, "signals")
    assert jailed.run() == 0, jailed.output()
    assert [line for line in _lines(jailed) if "->" in line or "ended" in line] == [
        "SIGSTOP -> Signalled",
        "SIGCONT -> Signalled",
        "SIGKILL -> Signalled",
        "ended signal=9",
        "again -> Spawned",
    ]


@pytest.mark.parametrize(
    ("worker", "ended"),
    [
        ("exit-5", "ended 0 status=5 signal=0 wall=''"),
        ("sigsys", "ended 0 status=0 signal=31 wall='seccomp'"),
        ("exit-unsealed", "ended 0 status=0 signal=0 wall=''"),
        ("fail-early", "ended 0 status=7 signal=0 wall=''"),
    ],
)
def test_how_a_worker_ended_is_told(base: Path, worker: str, ended: str) -> None:
    jailed = stand_in(base, "one-worker", arguments=("one-worker", worker))
    assert jailed.run() == 0, jailed.output()
    assert ended in _lines(jailed)


def test_device_cells_within_and_beyond_the_plan(base: Path) -> None:
    jailed = stand_in(base, "device-cells")
    assert jailed.run() == 0, jailed.output()
    last = MAX_DEVICE_CELLS - 1
    assert [line for line in _lines(jailed) if "->" in line or "ended" in line] == [
        "first -> Spawned device 0",
        f"Spawn device {last} -> Spawned",
        f"Spawn device {last + 1} -> Failed supervisor.plan",
        "Spawn device 0 -> Failed supervisor.plan",
        "Spawn device 0 -> Failed supervisor.plan",
        "Spawn vmm 0 -> Failed supervisor.plan",
        "Spawn device 0 -> Spawned",
        "Spawn device 0 -> Failed supervisor.exists",
        "SignalCell vcpu 0 -> Failed supervisor.signal",
        "SignalCell device 0 -> Failed supervisor.signal",
        "SignalCell device 0 -> Signalled",
        "ended device 0 signal=9 first=True",
    ]


@pytest.mark.parametrize(
    ("cell", "ended"),
    [
        ("exit-5", "ended device status=5 signal=0 wall=''"),
        ("sigsys", "ended device status=0 signal=31 wall='seccomp'"),
        ("fail-early", "ended device status=7 signal=0 wall=''"),
        ("no-second-filter", "ended device status=0 signal=9 wall='verify'"),
    ],
)
def test_how_a_device_cell_ended_is_told(base: Path, cell: str, ended: str) -> None:
    jailed = stand_in(base, "one-device-cell", arguments=("one-device-cell", cell))
    assert jailed.run() == 0, jailed.output()
    assert ended in _lines(jailed)


def test_walls_of_a_device_cell_are_those_of_a_worker(base: Path) -> None:
    jailed = stand_in(base, "worker-and-device-cell").start()
    for cell in ("worker 0", "device 0"):
        _wait_line(jailed, f"{cell} sealed")
    assert jailed.stop() == -signal.SIGTERM
    records = jailed.wall_records()
    worker, device_cell = records["vcpu 0"], records["device 0"]
    assert device_cell["verified"], device_cell["differences"]
    assert device_cell["found"]["uid"] == device_cell["found"]["gid"] != worker["found"]["uid"]
    for each in ("groups", "capabilities", "no_new_privs", "seccomp", "namespaces", "root", "landlock"):
        assert device_cell["found"].get(each) == worker["found"].get(each), each
    assert device_cell["found"]["limits"]["processes"] == ["0", "0"]
    assert device_cell["seccomp"]["sha256"] != worker["seccomp"]["sha256"]


def test_worker_whose_walls_differ_is_ended(base: Path) -> None:
    # Without the filter, which would not let it change its limits.
    jailed = stand_in(base, "one-worker", "--seccomp-mode", "off", arguments=("one-worker", "lower-limit"))
    assert jailed.run() == 0, jailed.output()
    assert "ended 0 status=0 signal=9 wall='verify'" in _lines(jailed)
    assert "worker 0 sealed" not in _lines(jailed)
    record = jailed.wall_records()["vcpu 0"]
    assert not record["verified"]
    assert record["found"]["limits"]["open files"] == ["100", "264"]
    assert "vcpu 0 (pid " in jailed.log()
    assert "walls differ: limits:" in jailed.log()


def test_controller_whose_walls_differ_ends_the_launch(base: Path) -> None:
    jailed = stand_in(base, "lower-limit", "--seccomp-mode", "off")
    assert jailed.run() == 1
    assert "sealed" not in _lines(jailed)
    assert "vmm (pid " in jailed.log()
    assert "walls differ: limits:" in jailed.log()


def test_a_difference_is_only_reported_without_verification(base: Path) -> None:
    jailed = stand_in(base, "exit-3", "--without", "verify", arguments=("exit-3",))
    assert jailed.run() == 3
    again = ("idle", "lower-limit")
    options = ("--without", "verify", "--seccomp-mode", "off")
    jailed = stand_in(base, "", *options, arguments=again, microvm_id=id_of(base, "two")).start()
    _wait_line(jailed, "worker 0 sealed")
    assert jailed.stop() == -signal.SIGTERM
    assert not jailed.wall_records()["vcpu 0"]["verified"]


def test_walls_report(base: Path) -> None:
    jailed = stand_in(base, "one-worker", arguments=("one-worker", "exit-5"))
    assert jailed.run() == 0
    records = jailed.wall_records()
    assert set(records) == {"supervisor", "vmm", "vcpu 0"}
    for name, record in records.items():
        assert record["verified"], name
        assert record["differences"] == record["switched_off"] == [], name
        assert record["seccomp"]["mode"] == "kill", name
        assert len(record["seccomp"]["sha256"]) == 64, name
        for wall, asked in record["asked"].items():
            assert record["found"][wall] == asked, (name, wall)
        stages = record["stages"]
        assert list(stages) == (["running"] if name == "supervisor" else ["setup", "running"]), name
        for stage, line in stages.items():
            filters = {"supervisor": 1, "vmm": 1, "vcpu 0": 2}[name] + (name != "supervisor" and stage == "running")
            assert line["found"]["seccomp"] == [{"mode": 2, "filters": filters}], (name, stage)
    digests = [line["seccomp"]["sha256"] for record in records.values() for line in record["stages"].values()]
    assert len(set(digests)) == 5


@pytest.mark.parametrize(
    ("behaviour", "code", "text"),
    [
        ("exit-3", 3, ""),
        ("crash", 1, "vmm: RuntimeError: a defect of the controller at stand_in.py:"),
        ("segfault", 150, ""),
        ("garbage", 1, ""),
        ("flood", 1, ""),
    ],
)
def test_exit_code_of_the_controller_is_the_microvms(
    base: Path, no_leftovers: NoLeftovers, behaviour: str, code: int, text: str
) -> None:
    with no_leftovers(names=(id_of(base),)):
        jailed = stand_in(base, behaviour)
        assert jailed.run() == code, jailed.output() + jailed.log()
    assert text in jailed.output()
    assert "Traceback" not in jailed.output()


def test_last_log_line_when_the_controller_cannot_write_it(base: Path) -> None:
    jailed = stand_in(base, "segfault")
    assert jailed.run() == 150
    lines = jailed.log().splitlines()
    assert lines[-2].endswith("was ended by signal 11 (SIGSEGV)")
    assert lines[-1].endswith("Firecracker exiting with error. exit_code=150")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGQUIT, 131),
        (signal.SIGHUP, 156),
        (signal.SIGSYS, 2),
        (signal.SIGBUS, 149),
        (signal.SIGSEGV, 150),
        (signal.SIGXFSZ, 151),
        (signal.SIGXCPU, 154),
        (signal.SIGILL, 157),
    ],
)
def test_signals_to_the_visible_process(base: Path, number: signal.Signals, code: int) -> None:
    jailed = stand_in(base, "idle").start()
    try:
        _wait_line(jailed, "worker 0 sealed")
        os.kill(jailed.pid, number)
        # Those that Firecracker leaves alone end the process themselves, after an orderly end.
        dies = number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
        assert jailed.process.wait(10) == (-number if dies else code)
        assert f"shutdown {code} Shutting down VM after intercepting signal {int(number)}, code 0." in _lines(jailed)
    finally:
        jailed.destroy()


def test_sigpipe_ends_nothing(base: Path) -> None:
    jailed = stand_in(base, "idle").start()
    try:
        _wait_line(jailed, "worker 0 sealed")
        os.kill(jailed.pid, signal.SIGPIPE)
        os.kill(jailed.pid, signal.SIGTERM)
        assert jailed.process.wait(10) == -signal.SIGTERM
    finally:
        jailed.destroy()


@pytest.mark.parametrize("behaviour", ["deaf", "never-seal"])
def test_a_controller_that_does_not_react_is_ended(base: Path, no_leftovers: NoLeftovers, behaviour: str) -> None:
    with no_leftovers(names=(id_of(base),)):
        jailed = stand_in(base, behaviour).start()
        try:
            wait_for(lambda: jailed.wall_records().get("supervisor"), "the supervisor")
            if behaviour == "deaf":
                _wait_line(jailed, "deaf")
            os.kill(jailed.pid, signal.SIGTERM)
            assert jailed.process.wait(10) == -signal.SIGTERM
        finally:
            jailed.destroy()
    assert jailed.log().splitlines()[-1].endswith("Firecracker exiting with error. exit_code=143")


@pytest.mark.parametrize("point", ["cell.forked", "cell.confined", "cell.filtered", "cell.sealed"])
def test_a_worker_that_is_killed_at_a_step_of_its_start_leaves_the_others_alone(base: Path, point: str) -> None:
    jailed = stand_in(base, "idle", "--arm-fault", f"{point}=kill,after=1").start()
    try:
        _wait_line(jailed, "ended 0 status=0 signal=9 wall=''")
        assert set(children(jailed.pid)) == {"vmm"}
    finally:
        assert jailed.stop() == -signal.SIGTERM


@pytest.mark.parametrize("point", ["cell.forked", "cell.confined", "cell.filtered", "cell.sealed"])
def test_a_controller_that_is_killed_at_a_step_of_its_start_ends_the_launch(
    base: Path, no_leftovers: NoLeftovers, point: str
) -> None:
    with no_leftovers(names=(id_of(base),)):
        assert stand_in(base, "idle", "--arm-fault", f"{point}=kill").run() == 1


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("no-thread", "no thread can be made"),
        # What a library of C++ does; abort(3) is forbidden by the filter that a worker inherits.
        ("abort", "a library has given up: Too many open files"),
        ("abort-without-a-thread", "no thread can be made: Resource temporarily unavailable (os error 11): raise the"),
    ],
)
def test_a_worker_that_cannot_start_says_why(base: Path, behaviour: str, text: str) -> None:
    jailed = stand_in(base, "one-worker", arguments=("one-worker", behaviour))
    assert jailed.run() == 0, jailed.describe()
    assert any(line.startswith(f"text {text}") for line in _lines(jailed)), jailed.describe()
    assert not any(".cpp" in line for line in _lines(jailed))
    assert (".cpp" in jailed.printed()) == behaviour.startswith("abort")  # its words, for who reads standard error
    assert all(line.startswith("vcpu 0: ") for line in jailed.printed().splitlines() if ".cpp" in line)
    (line,) = jailed.log().splitlines()
    assert "vcpu 0 (pid " in line
    assert f") cannot start: {text}" in line


@pytest.mark.parametrize("behaviour", ["nonsense", "hidden-twice", "tightening"])
def test_a_hidden_cell_is_believed_nothing_but_its_second_filter(base: Path, behaviour: str) -> None:
    jailed = stand_in(base, "one-worker", arguments=("one-worker", behaviour))
    assert jailed.run() == 0, jailed.describe()
    assert "ended 0 status=0 signal=9 wall='verify'" in _lines(jailed)
    assert "said what it may not say while it is sealed" in jailed.log()


def test_a_cell_that_says_it_has_its_second_filter_and_has_not_is_ended(base: Path) -> None:
    jailed = stand_in(base, "one-worker", arguments=("one-worker", "no-second-filter"))
    assert jailed.run() == 0, jailed.describe()
    assert "ended 0 status=0 signal=9 wall='verify'" in _lines(jailed)
    assert "walls differ: seccomp: asked [{'mode': 2, 'filters': 3}], found [{'mode': 2, 'filters': 2}]" in jailed.log()


def test_a_cell_has_its_walls_before_it_reads_what_another_cell_sends(base: Path) -> None:
    """The worker that is forked ahead waits for the first byte of others: filtered, verified, and not dumpable."""
    jailed = _ahead(base, "late").start()
    try:
        _wait_line(jailed, "sealed")
        ahead = wait_for(lambda: children(jailed.pid).get("vcpu 0"), "the worker")
        wait_for(lambda: "setup" in jailed.wall_records().get("vcpu 0", {"stages": ()})["stages"], "its walls")
        wait_for(lambda: Path(f"/proc/{ahead}/status").stat().st_uid == 0, "that it is not dumpable")
        assert status(ahead)["Seccomp_filters"] == "2"  # the supervisor's and its own
        assert re.search(r"^Max processes +0 +0 ", Path(f"/proc/{ahead}/limits").read_text(), re.MULTILINE)
        assert "worker 0 sealed" not in _lines(jailed)  # nobody has asked
    finally:
        assert jailed.stop() == -signal.SIGTERM


def _descriptor_kinds(pid: int) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for target in descriptors(pid).values():
        kind = target.split(":")[0] if ":" in target else target
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def test_supervisor_holds_no_more_than_it_needs(base: Path) -> None:
    jailed = stand_in(base, "idle").start()
    try:
        _wait_line(jailed, "worker 0 sealed")
        # Standard input and output, standard error, the walls' log, the pid file (locked), /dev/kvm, signals, /proc,
        # a pidfd and a log pipe per cell, the controller's channel; the workers' Landlock ruleset if there is one.
        expected = {
            "/dev/null": 2,
            str(jailed.output_file): 1,
            str(jailed.wall_log): 1,
            "/firecracker.pid": 1,
            "/dev/kvm": 1,
            "anon_inode": 3 + (landlock.abi() > 0),
            "/": 1,
            "socket": 1,
            "pipe": 2,
        }
        # The worker speaks as soon as it may go on; the supervisor closes the seal's socket right after that.
        wait_for(
            lambda: _descriptor_kinds(jailed.pid) == expected,
            lambda: f"exactly the documented descriptors, not {_descriptor_kinds(jailed.pid)}",
        )
    finally:
        jailed.stop()


# ---------------------------------------------------------------- the worker that is forked ahead


def _ahead(base: Path, controller: str, *options: str) -> JailedMicrovm:
    return stand_in(base, controller, *options, arguments=(controller, "wait", "ahead"))


def test_the_first_worker_is_there_before_it_is_asked_for(base: Path) -> None:
    jailed = _ahead(base, "late").start()
    try:
        _wait_line(jailed, "sealed")
        ahead = wait_for(lambda: children(jailed.pid).get("vcpu 0"), "the worker")
        assert "worker 0 sealed" not in _lines(jailed)  # nobody has asked
        (jailed.root / "go").touch()
        _wait_line(jailed, "worker 0 sealed")
        assert f"spawned pid {ahead}" in _lines(jailed)
        assert {"vmm", "vcpu 0"} == set(children(jailed.pid))
        assert "vcpu 0" in jailed.wall_records()
    finally:
        assert jailed.stop() == -signal.SIGTERM


def test_a_worker_that_dies_before_it_is_asked_for_is_replaced(base: Path) -> None:
    jailed = _ahead(base, "late").start()
    try:
        _wait_line(jailed, "sealed")
        ahead = wait_for(lambda: children(jailed.pid).get("vcpu 0"), "the worker")
        os.kill(ahead, signal.SIGKILL)
        wait_for(lambda: "vcpu 0" not in children(jailed.pid), "its end")
        (jailed.root / "go").touch()
        _wait_line(jailed, "worker 0 sealed")
        assert f"spawned pid {ahead}" not in _lines(jailed)
        assert not [line for line in _lines(jailed) if line.startswith("ended")]  # the controller never knew of it
    finally:
        assert jailed.stop() == -signal.SIGTERM


def test_one_that_does_not_fit_is_refused(base: Path) -> None:
    jailed = _ahead(base, "choosy")
    assert jailed.run() == 0, jailed.output()
    assert "other supervisor.exists" in _lines(jailed)
    assert [line for line in _lines(jailed) if line.startswith("spawned pid")]


def test_a_worker_that_nobody_asks_for_ends_with_the_others(base: Path, no_leftovers: NoLeftovers) -> None:
    with no_leftovers(names=(id_of(base),)):
        assert _ahead(base, "exit-3").run() == 3
