"""What the controller pays for an exit: ring entries executed per second, by kind.

    python -m bench.exit_executor [ROUNDS]

One process posts, then executes, rounds of a full ring (the figure is the executor's alone). Then a second process
posts UART bytes as fast as it can while this one serves its event loop (the figure is that of both together).
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from base.deferral import Deferral
from base.event_manager import EventManager
from ipc.exit_ring import (
    ENTRY_COUNT,
    KIND_MMIO_READ,
    KIND_PIO_READ,
    KIND_PIO_STRING_WRITE,
    KIND_PIO_WRITE,
    RING_SIZE,
    ExitRingProducer,
)
from ipc.messages.records import Route
from ipc.shared_memory import map_shared
from vmm.cells.exits import ExitExecutor
from vmm.devices.legacy.console import ConsoleOutput
from vmm.devices.manager import DeviceManager
from vmm.layout import COM1_PORT, I8042_DATA_PORT, IOAPIC_ADDRESS

ROUNDS = 200
POSTED = 200_000
STRING_LENGTH = 1024
#: As the worker posts UART bytes while the guest does not ask for transmitter interrupts.
LAZY = 1


def _in_force(routes: Sequence[Route]) -> Deferral:
    deferral = Deferral()
    deferral.complete()
    return deferral


class Machine:
    """Devices, a console on /dev/null, and one ring with its executor and producer."""

    def __init__(self) -> None:
        self.output = ConsoleOutput(os.open("/dev/null", os.O_WRONLY), owned=True)
        self.devices = DeviceManager(
            transmit=self.output.transmit,
            reset=lambda: None,
            set_routes=_in_force,
            log=lambda text: None,
        )
        self.executor = ExitExecutor(
            self.devices.ports,
            self.devices.mmio,
            before_batch=self.devices.begin_batch,
            after_batch=self._after_batch,
            failed=sys.exit,
        )
        self.buffer = map_shared(self.executor.descriptor, RING_SIZE)
        self.producer = ExitRingProducer(self.buffer, self.executor.doorbell, self.executor.completion)

    def _after_batch(self) -> None:
        self.devices.end_batch()
        self.output.flush()


def per_entry(machine: Machine, rounds: int, post: Callable[[ExitRingProducer], object], batch: int) -> float:
    """Return the median time of one entry in nanoseconds."""
    times = []
    for _ in range(rounds):
        for _ in range(batch):
            post(machine.producer)
        start = time.perf_counter_ns()
        machine.executor.drain()
        times.append((time.perf_counter_ns() - start) / batch)
    return statistics.median(times)


def post_synchronous(kind: int, address: int, size: int, count: int = 1) -> Callable[[ExitRingProducer], object]:
    """Return a function that posts what a vCPU would wait for, without waiting."""
    return lambda producer: producer._publish(kind, address, size, 0, 1, count, 0)


def show(name: str, nanoseconds: float) -> None:
    """Print one line."""
    print(f"{name:44} {nanoseconds / 1000:7.2f} us   {1e9 / nanoseconds:9,.0f} a second")


def two_processes(machine: Machine) -> None:
    """Serve a process that posts without pause."""
    pid = os.fork()
    if pid == 0:
        for _ in range(POSTED):
            machine.producer.post(KIND_PIO_WRITE, COM1_PORT, 1, 0x41, LAZY)
        os._exit(0)
    events = EventManager()
    events.add_subscriber(machine.executor)
    before = machine.devices.serial.write_count
    start, start_cpu = time.perf_counter_ns(), time.process_time_ns()
    try:
        events.run_until(
            lambda: machine.devices.serial.write_count - before == POSTED, time.monotonic_ns() + 60_000_000_000
        )
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    wall, cpu = time.perf_counter_ns() - start, time.process_time_ns() - start_cpu
    show("two processes, UART byte, posted (wall)", wall / POSTED)
    show("  the controller's CPU time of it", cpu / POSTED)


def main(arguments: list[str]) -> int:
    """Run the benchmark."""
    rounds = int(arguments[0]) if arguments else ROUNDS
    machine = Machine()
    show(
        "UART byte, posted",
        per_entry(machine, rounds, lambda producer: producer.post(KIND_PIO_WRITE, COM1_PORT, 1, 0x41), ENTRY_COUNT),
    )
    for name, kind, address, size in (
        ("UART IIR, read", KIND_PIO_READ, COM1_PORT + 2, 1),
        ("i8042 data, read", KIND_PIO_READ, I8042_DATA_PORT, 1),
        ("IOAPIC window, read", KIND_MMIO_READ, IOAPIC_ADDRESS + 0x10, 4),
    ):
        show(name, per_entry(machine, rounds, post_synchronous(kind, address, size), ENTRY_COUNT))
    string = post_synchronous(KIND_PIO_STRING_WRITE, COM1_PORT, 1, STRING_LENGTH)
    show("UART byte of a string", per_entry(machine, rounds // 4 or 1, string, 1) / STRING_LENGTH)
    two_processes(machine)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
