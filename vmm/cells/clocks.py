"""One time for all workers: each has a VM of its own, hence a TSC offset and a kvmclock of its own (docs/smp.md)."""

from __future__ import annotations

from base.lean_typing import Sequence
from ipc.messages.ghosts import ClockRead, ClockSet, ReadClock, SetClock
from vmm.cells.worker import Worker
from vmm.observe.logger import LOG


def synchronise_clocks(workers: Sequence[Worker]) -> None:
    """Give all vCPUs of all workers one TSC and, as nearly as the host can, one kvmclock. Raises WorkerError."""
    first, *others = workers
    first.clock_ahead_ns = 0
    clock = first.request(ReadClock(), ClockRead)
    if others and not clock.has_tsc_offset:
        LOG.warn("This host's KVM cannot align the time stamp counters of several workers (Linux 5.16 can).")
    pending = [(worker, worker.submit(SetClock(*clock))) for worker in others]
    for worker, sequence in pending:
        reached = worker.collect(sequence, ClockSet)
        worker.clock_ahead_ns = None
        if reached.measured:
            difference = worker.clock_ahead_ns = reached.nanoseconds if reached.ahead else -reached.nanoseconds
            LOG.debug(f"The kvmclock of worker vcpu {worker.index} is {difference} ns ahead of that of worker vcpu 0.")
