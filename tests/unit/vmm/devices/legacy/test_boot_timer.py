"""The boot timer."""

from __future__ import annotations

import re
import time

import pytest

from vmm.devices.legacy.boot_timer import MAX_REPORTS, BootTimer


def test_the_boot_timer_reports_as_clients_parse_it():
    log: list[str] = []
    timer = BootTimer(time.monotonic_ns() // 1000 - 1_234_567, 0, log.append)
    timer.write(0, 1, 123)
    found = re.fullmatch(r"Guest-boot-time = +(\d+) us (\d+) ms, +(\d+) CPU us (\d+) CPU ms", log[0])
    assert found is not None
    wall, wall_ms, cpu, cpu_ms = map(int, found.groups())
    assert wall >= 1_234_567
    assert wall_ms == wall // 1000
    assert cpu_ms == cpu // 1000


@pytest.mark.parametrize(("offset", "size", "value"), [(0, 1, 122), (1, 1, 123), (0, 4, 123), (0xFFF, 1, 123)])
def test_the_boot_timer_ignores_everything_else(offset, size, value):
    log: list[str] = []
    timer = BootTimer(0, 0, log.append)
    assert timer.write(offset, size, value) is None
    assert timer.read(offset, size) == 0
    assert log == []


def test_the_boot_timer_cannot_fill_the_log():
    log: list[str] = []
    timer = BootTimer(0, 0, log.append)
    for _ in range(1000):
        timer.write(0, 1, 123)
    assert len(log) == MAX_REPORTS
