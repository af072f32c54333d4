"""Fixtures of the legacy devices."""

from __future__ import annotations

import pytest

from base.event_manager import EventManager
from tests.harness.devices import CountingLine
from tests.harness.uart import Uart
from vmm.devices.legacy.serial import Serial


@pytest.fixture
def events():
    manager = EventManager()
    yield manager
    manager.close()


@pytest.fixture
def serial():
    line = CountingLine()
    yield Serial(line, lambda byte: None)
    line.close()


@pytest.fixture
def uart():
    uart = Uart()
    yield uart
    uart.close()
