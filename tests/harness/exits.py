"""Exit rings, buses with a recorder, and an event loop that executes what comes."""

from __future__ import annotations

import os
import select
import time

from base.deferral import Deferral
from base.event_manager import EventManager
from ipc.exit_ring import (
    KIND_PIO_WRITE,
    RING_SIZE,
    ExitRingProducer,
)
from ipc.shared_memory import map_shared
from tests.harness.devices import Page, Recorder
from tests.harness.processes import Child
from vmm.cells.exits import ExitExecutor
from vmm.devices.bus import mmio_bus, port_bus
from vmm.devices.legacy.exerciser import (
    EXERCISER_PORT,
    PORT_COUNT,
    Exerciser,
    ExerciserPage,
)

PATIENCE_NS = 60_000_000_000
PORT = 0x100
MMIO = 0x1000


class Machine:
    """Buses with a recorder and an exerciser, an event loop, and any number of rings."""

    def __init__(self) -> None:
        self.page = Page()
        self.ports = port_bus(self.page.page)
        self.mmio = mmio_bus(self.page.page)
        self.device = Recorder()
        self.ports.insert(self.device, PORT, 8)
        self.mmio.insert(self.device, MMIO, 0x1000)
        self.log: list[str] = []
        self.exerciser = Exerciser(self.log.append, lambda code: None)
        self.exerciser.attach(self.ports.insert(self.exerciser, EXERCISER_PORT, PORT_COUNT))
        self.mmio.insert(ExerciserPage(self.exerciser), 0x2000, 0x1000)
        self.events = EventManager()
        self.batches = 0
        self.failures: list[str] = []
        self.executors: list[ExitExecutor] = []
        self._rings: list[ExitExecutor] = []
        self._mappings: list = []
        self._children: list[Child] = []

    def _batch(self) -> None:
        self.batches += 1

    def ring(self) -> ExitExecutor:
        executor = ExitExecutor(
            self.ports, self.mmio, after_batch=self._batch, failed=self.failures.append, rings=self._rings
        )
        self.events.add_subscriber(executor)
        self.executors.append(executor)
        return executor

    def producer(self, executor: ExitExecutor) -> ExitRingProducer:
        """A producer in this process: it must only post what nobody waits for."""
        buffer = map_shared(executor.descriptor, RING_SIZE)
        producer = ExitRingProducer(buffer, executor.doorbell, executor.completion)
        self._mappings += [producer, buffer]
        return producer

    def child(self, function) -> Child:
        """Run a function in another process, which does not outlive the test."""
        self._children.append(Child(function))
        return self._children[-1]

    def serve(self, done) -> None:
        assert self.events.run_until(done, time.monotonic_ns() + PATIENCE_NS), "did not happen"

    def serve_child(self, child: Child):
        """Serve exits until the child has ended; returns its result."""
        pidfd = os.pidfd_open(child.pid)
        ended = Watch(pidfd)
        number = self.events.add_subscriber(ended)
        self.serve(lambda: ended.called)
        self.events.remove_subscriber(number)
        os.close(pidfd)
        result = child.join()
        self.serve(lambda: all(executor.idle for executor in self.executors))
        return result

    def close(self) -> None:
        for child in self._children:
            child.kill()
        self.events.close()
        for each in self._mappings:
            each.close()
        for executor in self.executors:
            executor.close()
        self.page.close()


class Watch:
    """A subscriber that notes when its descriptor becomes readable."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.called = 0

    def init(self, ops) -> None:
        ops.add(self.descriptor, select.EPOLLIN)

    def process(self, events, ops) -> None:
        self.called += 1


class Endless(Recorder):
    """A hostile worker that posts again for every entry that is executed."""

    def __init__(self, producer: ExitRingProducer) -> None:
        super().__init__()
        self.producer = producer
        self.count = 0
        self.going = True

    def write(self, offset: int, size: int, value: int) -> Deferral | None:
        self.count += 1
        if self.going and offset == 0:
            self.producer.post(KIND_PIO_WRITE, 0x300, 1, 0)
        return None
