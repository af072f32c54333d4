"""Reads into the metrics what the parts of a microVM count by themselves."""

from __future__ import annotations

from ipc.exit_ring import COUNTER_IO_IN, COUNTER_IO_OUT, COUNTER_MMIO_READ, COUNTER_MMIO_WRITE
from ipc.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from ipc.typed import Sequence
    from vmm.console import ConsoleOutput
    from vmm.devices.i8042 import I8042
    from vmm.devices.serial import Serial
    from vmm.logger import Logger
    from vmm.metrics import Metrics

_EXITS = (
    ("exit_io_in", COUNTER_IO_IN),
    ("exit_io_out", COUNTER_IO_OUT),
    ("exit_mmio_read", COUNTER_MMIO_READ),
    ("exit_mmio_write", COUNTER_MMIO_WRITE),
)


def read_logger(metrics: Metrics, logger: Logger) -> None:
    """Take over the log's loss counters."""
    group = metrics["logger"]
    group.store("missed_log_count", logger.missed_log_count)
    group.store("rate_limited_log_count", logger.rate_limited_log_count)


def read_exits(metrics: Metrics, counters: Sequence[Sequence[int]]) -> None:
    """Take over the exit counters of all vCPUs (in the order of ipc.exit_ring.COUNTER_NAMES)."""
    group = metrics["vcpu"]
    for key, index in _EXITS:
        group.store(key, sum([of_vcpu[index] for of_vcpu in counters]))


def read_devices(metrics: Metrics, i8042: I8042, serial: Serial, console: ConsoleOutput | None) -> None:
    """Take over what the legacy devices have counted. Reads that the worker answers by itself are not among it."""
    keyboard = metrics["i8042"]
    keyboard.store("error_count", i8042.error_count)
    keyboard.store("read_count", i8042.read_count)
    keyboard.store("write_count", i8042.write_count)
    keyboard.store("reset_count", i8042.reset_count)
    uart = metrics["uart"]
    uart.store("read_count", serial.read_count)
    uart.store("write_count", serial.write_count)
    if console is not None:
        uart.store("flush_count", console.flush_count)
        uart.store("missed_write_count", console.lost_bytes)
        uart.store("rate_limiter_dropped_bytes", console.rate_limiter_dropped_bytes)
