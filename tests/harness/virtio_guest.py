"""A microVM of the real builder with an entropy device that this process serves; its guest: virtio_mmio.S.

Devices have cells of their own in the product; what stands in for them here is the loop that the controller runs in.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from base.event_manager import EventOps, Events
from ipc import exit_ring
from tests.guests.build import build
from tests.harness.vmm_in_process import Machine
from virtio.entropy import Entropy
from vmm.devices.transport.mmio import MmioTransport
from vmm.machine.assembly import Assembly

PROGRESS = 0x80000


class Progress(NamedTuple):
    """What the guest has counted."""

    requests: int
    interrupts: int
    config_changes: int
    lives: int


class ServedHere:
    """Lets a device of this process hear its doorbells."""

    def __init__(self, transport: MmioTransport) -> None:
        self.transport = transport
        self.kicks = 0

    def init(self, ops: EventOps) -> None:
        self.transport.device.init(ops)
        for queue, kick in enumerate(self.transport.kicks):
            # Edge-triggered: the count says nothing, and is never read.
            ops.watch(kick, select.EPOLLIN | select.EPOLLET, self._served(queue))

    def _served(self, queue: int) -> Callable[[int], None]:
        def kicked(event_set: int) -> None:
            self.kicks += 1
            self.transport.notified(queue)

        return kicked

    def process(self, events: Events, ops: EventOps) -> None:
        raise AssertionError("nothing is watched this way")


class VirtioGuest:
    """The machine, its transport, and what the guest says."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, vcpus: int, placement: str, **symbols: int):
        self.machine = Machine(directory)
        served: list[ServedHere] = []
        attach = Assembly.attach_devices

        def with_entropy(assembly: Assembly, *arguments: Any) -> None:
            attach(assembly, *arguments)
            transport = assembly.devices.attach_virtio(Entropy("rng"), assembly.vmm.vm.memory)
            served.append(ServedHere(transport))
            self.machine.cells.events.add_subscriber(served[0])

        monkeypatch.setattr(Assembly, "attach_devices", with_entropy)
        config = {"vcpu_count": vcpus, "mem_size_mib": 64, "vcpu_placement": placement}
        assert self.machine.send("PUT", "/machine-config", config) is None
        kernel = build("virtio_mmio", {"CPUS": vcpus, **symbols})
        assert self.machine.send("PUT", "/boot-source", {"kernel_image_path": str(kernel)}) is None
        assert self.machine.send("PUT", "/actions", {"action_type": "InstanceStart"}) is None
        (self.served,) = served
        self.transport = self.served.transport

    def progress(self) -> Progress:
        return Progress(*struct.unpack("<4I", self.machine.vmm.vm.memory.read(PROGRESS, 16)))

    def serve_until(self, done: Callable[[Progress], bool]) -> Progress:
        """Run the loop until the guest has got so far; its end is a failure."""

        def settled() -> bool:
            return self.machine.vmm.shutdown_exit_code() is not None or done(self.progress())

        self.machine.cells.serve(settled)
        assert self.machine.vmm.shutdown_exit_code() is None, "the guest has found a fault"
        return self.progress()

    def more_requests(self, count: int) -> Progress:
        """Run the loop for so many requests."""
        begun = self.progress().requests
        return self.serve_until(lambda progress: progress.requests >= begun + count)

    def entries(self) -> int:
        """How many exits there were; that a KVM_RUN was interrupted does not count.

        Workers publish their counts when they are asked for a sign of life, or parked.
        """
        self.machine.vmm.pause_vm()
        self.machine.vmm.resume_vm()
        return sum(each[exit_ring.COUNTER_EXITS] for each in self.machine.vmm.exit_counters().values())

    def close(self) -> None:
        self.machine.close()
