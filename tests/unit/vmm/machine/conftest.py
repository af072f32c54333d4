"""Fixtures of the tests of vmm.machine."""

from __future__ import annotations

import pytest

from tests.harness.cells import (
    honest,
)
from tests.harness.machine import Machine


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
