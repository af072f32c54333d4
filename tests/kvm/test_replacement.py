"""Live replacement of workers through the whole product, on this host's /dev/kvm: the guest must not notice.

The guests check themselves: the exerciser counts every exit, the IPI guest every interrupt; each ends the microVM when
one is lost or comes twice.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from lab.client import ClientError, Microvm, descendants, launch_unjailed, request, without_log
from tests.guests.build import build
from tests.harness.processes import wait_for
from tests.harness.run_options import SOAK

#: So many rounds never end within a test.
FOREVER = 1 << 30
PATIENCE_S = 60.0
#: What a request to a microVM raises that ends before it answers.
ENDED = (OSError, ClientError)


@contextmanager
def running(directory: Path, guest: str, machine: dict[str, Any], **symbols: int) -> Iterator[Microvm]:
    """A microVM that runs for ever, with an exerciser device."""
    kernel = build(guest, symbols)
    with launch_unjailed(directory, ["--exerciser"]) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(kernel), "boot_args": "10000000"})
        vm.must("PUT", "/machine-config", {"mem_size_mib": 64, "vcpu_count": 1, **machine})
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        yield vm


def ipis(directory: Path, vcpus: int, placement: str) -> Any:
    """The guest that sends interrupts for ever."""
    machine = {"vcpu_count": vcpus, "vcpu_placement": placement}
    return running(directory, "ipi", machine, CPUS=vcpus, ROUNDS=FOREVER, NMIS=1, RESTARTS=1)


def replace(vm: Microvm, vcpu: int | None = None) -> None:
    vm.must("PATCH", "/vcpus" if vcpu is None else f"/vcpus/{vcpu}", {"action": "Replace"})


def pids(vm: Microvm) -> list[int]:
    return [each["pid"] for each in vm.must("GET", "/vcpus")]


def pauses(vm: Microvm) -> list[int]:
    """How long the guest stood still each time, in µs; from the log."""
    text = vm.console.decode(errors="replace")
    return [int(found) for found in re.findall(r"the guest stood still for (\d+) us", text)]


def report(what: str, vm: Microvm) -> None:
    times = pauses(vm)
    print(f"\n{what}: {len(times)} replacements, pause median {median(times)} us, maximum {max(times)} us")


def exits(vm: Microvm) -> int:
    return sum(each["exits"] for each in vm.must("GET", "/vcpus"))


def stubs_are_placed(vm: Microvm) -> bool:
    return all(ghost["stub"] for each in vm.must("GET", "/vcpus") for ghost in each["ghosts"])


@pytest.mark.soak("smp")
def test_no_exit_is_lost_or_repeated(tmp_path, scale, seed, no_leftovers):
    generator = random.Random(seed)
    with no_leftovers(), running(tmp_path, "exerciser", {}) as vm:
        before = pids(vm)
        seen = set(before)
        for number in range(scale(10, 200)):
            replace(vm, 0)
            (vcpu,) = vm.must("GET", "/vcpus")
            assert vcpu["replacements"] == number + 1
            assert vcpu["state"] == "running"
            assert vcpu["pid"] not in seen
            seen.add(vcpu["pid"])
            time.sleep(generator.random() * 0.02)
        counted = exits(vm)
        wait_for(lambda: exits(vm) > counted, "a further exit")  # the counters go on, and so does the guest
        cells = set(descendants(vm.process.pid))
        assert cells & seen == {vm.must("GET", "/vcpus")[0]["pid"]}, "a worker that was replaced is still there"
        vm.process.terminate()
        vm.wait()
        output = vm.console.decode(errors="replace")
        assert "instead of" not in output
        assert "broke the protocol" not in output
        report("one vCPU, exits", vm)


@pytest.mark.slow
@pytest.mark.soak("smp")
@pytest.mark.parametrize("where", [(2, "Split"), (3, "Split"), (3, "Grouped"), (4, "0,1/2,3")], ids=str)
def test_no_interrupt_between_vcpus_is_lost_or_repeated(tmp_path, scale, seed, no_leftovers, where):
    vcpus, placement = where
    generator = random.Random(seed)
    with no_leftovers(), ipis(tmp_path, vcpus, placement) as vm:
        wait_for(lambda: stubs_are_placed(vm), "the start of every vCPU")
        count = scale(10, 200)
        for _ in range(count):
            vcpu = generator.randrange(vcpus)
            before = pids(vm)
            replace(vm, vcpu)
            after = pids(vm)
            assert after[vcpu] != before[vcpu]
            time.sleep(generator.random() * 0.02)
            assert "IPI" not in without_log(vm.console), vm.tail()
        for _ in range(scale(1, 10)):
            before = pids(vm)
            replace(vm)
            assert not set(before) & set(pids(vm))
        time.sleep(0.5)
        assert vm.must("GET", "/")["state"] == "Running"
        assert "IPI" not in without_log(vm.console), vm.tail()
        assert not any(ghost["recoveries"] for each in vm.must("GET", "/vcpus") for ghost in each["ghosts"])
        vm.must("PATCH", "/vm", {"state": "Paused"})
        vm.must("PATCH", "/vm", {"state": "Resumed"})
        report(f"{vcpus} vCPUs, {placement}", vm)


@pytest.mark.slow
def test_vcpus_start_while_workers_are_replaced(tmp_path, seed, no_leftovers):
    """From the first instruction on, also between INIT and SIPI: a guest whose processor does not start ends itself."""
    generator = random.Random(seed)
    kernel = build("ipi", {"CPUS": 3, "ROUNDS": 20, "NMIS": 1, "RESTARTS": 40})
    with no_leftovers(), launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        vm.must("PUT", "/boot-source", {"kernel_image_path": str(kernel)})
        vm.must("PUT", "/machine-config", {"mem_size_mib": 64, "vcpu_count": 3, "vcpu_placement": "Split"})
        vm.must("PUT", "/actions", {"action_type": "InstanceStart"})
        done = 0
        while vm.process.poll() is None:
            try:
                reply = request(vm.api_socket, "PATCH", f"/vcpus/{generator.randrange(3)}", {"action": "Replace"})
            except ENDED:
                break
            if reply.status != 204:
                break  # it is ending
            done += 1
        assert vm.wait(PATIENCE_S) == 0
        output = vm.console.decode(errors="replace")
        assert "IPI FAIL" not in output
        assert done > 0


# ---------------------------------------------------------------- signals at any moment


class _Request(threading.Thread):
    """A replacement that goes on while something happens."""

    def __init__(self, vm: Microvm, vcpu: int) -> None:
        super().__init__()
        self.status = 0
        self._socket = vm.api_socket
        self._vcpu = vcpu

    def run(self) -> None:
        try:
            self.status = request(self._socket, "PATCH", f"/vcpus/{self._vcpu}", {"action": "Replace"}).status
        except ENDED:
            pass


def _workers(vm: Microvm) -> list[int]:
    found = []
    for pid in descendants(vm.process.pid):
        try:
            if Path(f"/proc/{pid}/comm").read_text().startswith("vcpu"):
                found.append(pid)
        except OSError:
            pass  # it ended while we looked
    return found


def _lives_on_without(vm: Microvm, victim: int) -> bool:
    """Wait until the microVM has ended, or has no use for the worker that was killed."""
    deadline = time.monotonic() + PATIENCE_S
    while vm.process.poll() is None:
        assert time.monotonic() < deadline, "neither ended nor running"
        with suppress(*ENDED):
            if victim not in _workers(vm) and victim not in pids(vm):
                return True
        time.sleep(0.01)
    return False


def _signal_during_a_replacement(vm: Microvm, generator: random.Random) -> str:
    """Return what came of it: replaced, undone or ended."""
    thread = _Request(vm, generator.randrange(2))
    thread.start()
    time.sleep(generator.random() * 0.06)
    number = generator.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP))
    victim = generator.choice(_workers(vm))
    with suppress(ProcessLookupError):
        os.kill(victim, number)
    killed = time.monotonic()
    if number == signal.SIGSTOP:
        time.sleep(generator.random() * 0.3)
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGCONT)
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "no answer"
    if number == signal.SIGSTOP:
        assert thread.status == 204
        return "stopped"
    if _lives_on_without(vm, victim):
        return "replaced" if thread.status == 204 else "undone"
    assert vm.wait(PATIENCE_S) == (150 if number == signal.SIGSEGV else 1), vm.tail()
    if SOAK:
        assert time.monotonic() - killed < 1.5
    output = vm.console.decode(errors="replace")
    assert f"was ended by signal {number.name}" in output
    assert "last exit " in output
    return "ended"


@pytest.mark.slow
@pytest.mark.soak("smp")
def test_a_signal_at_any_moment_has_one_outcome(tmp_path, scale, seed, no_leftovers):
    generator = random.Random(seed)
    left = scale(12, 400)
    outcomes: Counter[str] = Counter()
    machine = 0
    while left > 0:
        machine += 1
        directory = tmp_path / str(machine)
        directory.mkdir()
        with no_leftovers(), ipis(directory, 2, "Split") as vm:
            wait_for(partial(stubs_are_placed, vm), "the start of every vCPU")
            outcome = ""
            while left > 0 and outcome != "ended":
                left -= 1
                outcome = _signal_during_a_replacement(vm, generator)
                outcomes[outcome] += 1
                assert "IPI" not in without_log(vm.console), vm.tail()
    print(f"\nsignals during replacements, seed {seed}: {dict(outcomes)}")


# ---------------------------------------------------------------- what is refused


def refused(vm: Microvm, path: str, body: Any, text: str) -> None:
    before = vm.must("GET", "/vcpus")
    reply = request(vm.api_socket, "PATCH", path, body)
    assert reply.status == 400
    assert text in reply.body["fault_message"]
    after = vm.must("GET", "/vcpus")
    assert [each["pid"] for each in after] == [each["pid"] for each in before], "something has changed"


def test_what_cannot_be_replaced_is_refused_and_nothing_changes(tmp_path, no_leftovers):
    with no_leftovers(), running(tmp_path, "spin", {}) as vm:
        refused(vm, "/vcpus/1", {"action": "Replace"}, "Replace worker error: There is no vCPU 1.")
        refused(vm, "/vcpus/99", {"action": "Replace"}, "There is no vCPU 99.")
        refused(vm, "/vcpus/x", {"action": "Replace"}, "Invalid vCPU index")
        refused(vm, "/vcpus/0/1", {"action": "Replace"}, "Invalid vCPU index")
        refused(vm, "/vcpus/0", {"action": "Restart"}, "unknown variant")
        refused(vm, "/vcpus/0", {}, "missing field")
        vm.must("PATCH", "/vm", {"state": "Paused"})
        refused(vm, "/vcpus/0", {"action": "Replace"}, "it is Paused")
        refused(vm, "/vcpus", {"action": "Replace"}, "it is Paused")
        assert vm.must("GET", "/vcpus")[0]["state"] == "paused"
        vm.must("PATCH", "/vm", {"state": "Resumed"})
        replace(vm)
        assert vm.must("GET", "/vcpus")[0]["replacements"] == 1


def test_before_the_start_there_is_nothing_to_replace(tmp_path):
    with launch_unjailed(tmp_path) as vm:
        vm.wait_for_api()
        reply = request(vm.api_socket, "PATCH", "/vcpus/0", {"action": "Replace"})
        assert (reply.status, reply.body) == (
            400, {"fault_message": "The requested operation is not supported before starting the microVM."},
        )  # fmt: skip
