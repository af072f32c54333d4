"""GET /vcpus: what is shown is read, from the worker's note and from shared memory; nobody is asked."""

from __future__ import annotations

from typing import Any

import pytest

from ipc.exit_ring import COUNTER_EXITS, GHOST_EXITS, GHOST_NMIS, GHOST_RECOVERIES, GHOST_STARTUPS, GHOST_STUB
from ipc.launch_plan import Assignment
from tests.harness.cells import Controller
from vmm.cells.exits import ExitExecutor
from vmm.machine.report import vcpu_report
from vmm.placement import Placement

NOTHING: Any = None


@pytest.fixture
def executors():
    made = {
        vcpu: ExitExecutor(NOTHING, NOTHING, after_batch=lambda: None, failed=lambda text: None) for vcpu in range(3)
    }
    yield made
    for each in made.values():
        each.close()


def write(executor: ExitExecutor, word: int, value: int) -> None:
    """What the worker would write."""
    executor._ring._words[word] = value


def test_counters_come_from_the_rings(tmp_path, executors):
    """Also those of a worker that was never forked, and of one that writes what it likes."""
    controller = Controller(str(tmp_path))
    try:
        first, second = controller.worker(0), controller.worker(1)
        first.assignment, second.assignment = Assignment(0, (0, 1), (2,)), Assignment(1, (2,), (0, 1))
        second.clock_ahead_ns = -5
        for word, value in (
            (GHOST_STUB, 7), (GHOST_EXITS, (1 << 64) - 1), (GHOST_STARTUPS, 3), (GHOST_NMIS, 4), (GHOST_RECOVERIES, 5)
        ):  # fmt: skip
            write(executors[0], 64 + 2 * 8 + word, value)
        for vcpu in range(3):
            write(executors[vcpu], 32 + COUNTER_EXITS, 100 + vcpu)
        placement = Placement("Grouped", ((0, 1), (2,)), "test")
        report: Any = vcpu_report(
            [(0, first), (1, first), (2, second)], placement, executors, lambda worker: worker is second, int
        )
    finally:
        controller.close()
    ghost = {"vcpu": 2, "stub": True, "exits": (1 << 64) - 1, "startups": 3, "nmis": 4, "recoveries": 5}
    quiet = {"stub": False, "exits": 0, "startups": 0, "nmis": 0, "recoveries": 0}
    assert [each["exits"] for each in report] == [100, 101, 102]
    assert [each["state"] for each in report] == ["absent", "absent", "stalled"]
    assert [each["worker"] for each in report] == [each["replacements"] for each in report] == [0, 0, 1]
    assert [each["ghosts"] for each in report] == [[ghost], [ghost], [{"vcpu": 0, **quiet}, {"vcpu": 1, **quiet}]]
    assert [each["clock_ahead_ns"] for each in report] == [None, None, -5]
    assert {each["placement"] for each in report} == {"Grouped"}
    assert {each["affinity"] for each in report} == {None}
