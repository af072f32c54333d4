"""Fixtures of the tests of vmm.cells."""

from __future__ import annotations

import pytest

from tests.harness.exits import Machine


@pytest.fixture
def machine():
    machine = Machine()
    yield machine
    machine.close()
