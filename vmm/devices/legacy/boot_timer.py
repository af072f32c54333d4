"""The boot timer: a guest writes one byte when its init runs, and the time since the start is logged."""

from __future__ import annotations

import time

from base.deferral import Deferral
from base.lean_typing import Callable
from vmm.devices.bus import Device

SIGNAL_VALUE = 123
#: The guest signals once when it has booted; one that goes on cannot fill the log.
MAX_REPORTS = 10


class BootTimer(Device):
    """Logs the time from ``start`` (CLOCK_MONOTONIC and CPU time, µs) to the write of 123."""

    def __init__(self, start_us: int, start_cpu_us: int, log: Callable[[str], None]) -> None:
        self._start_us = start_us
        self._start_cpu_us = start_cpu_us
        self._log = log
        self._reports = 0

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        """Log on the signal value at offset 0; ignore everything else."""
        if offset == 0 and size == 1 and value == SIGNAL_VALUE and self._reports < MAX_REPORTS:
            self._reports += 1
            wall = time.monotonic_ns() // 1000 - self._start_us
            cpu = time.process_time_ns() // 1000 - self._start_cpu_us
            self._log(f"Guest-boot-time = {wall:6} us {wall // 1000} ms, {cpu:6} CPU us {cpu // 1000} CPU ms")
        return None
