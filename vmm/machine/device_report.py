"""What is told of virtio devices: GET /devices, and their metrics."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, Sequence
from virtio.abi import (
    VIRTIO_ID_BALLOON,
    VIRTIO_ID_BLOCK,
    VIRTIO_ID_ENTROPY,
    VIRTIO_ID_MEM,
    VIRTIO_ID_NET,
    VIRTIO_ID_PMEM,
    VIRTIO_ID_VSOCK,
)

if TYPE_CHECKING:
    from base.counters import Counters
    from vmm.cells.device_pool import DeviceCells
    from vmm.devices.transport.mmio import MmioTransport
    from vmm.json.text import JsonValue
    from vmm.observe.metrics import Metrics

#: VIRTIO_ID_* → what GET /devices says.
KIND_NAMES = {
    VIRTIO_ID_NET: "net",
    VIRTIO_ID_BLOCK: "block",
    VIRTIO_ID_ENTROPY: "entropy",
    VIRTIO_ID_BALLOON: "balloon",
    VIRTIO_ID_VSOCK: "vsock",
    VIRTIO_ID_MEM: "mem",
    VIRTIO_ID_PMEM: "pmem",
}


def device_report(transports: Sequence[MmioTransport], cells: DeviceCells) -> list[JsonValue]:
    """Return one record per virtio device."""
    return [_device(transport, cells) for transport in transports]


def _device(transport: MmioTransport, cells: DeviceCells) -> JsonValue:
    device, registers = transport.device, transport.registers
    queues: list[JsonValue] = [
        {"size": queue.size, "ready": ready, "max_size": queue.max_size}
        for queue, ready in zip(registers.queues, registers.ready, strict=True)
    ]
    counters = device.counters
    return {
        "id": device.id,
        "kind": KIND_NAMES.get(device.kind, str(device.kind)),
        "address": transport.address,
        "gsi": transport.line.gsi,
        "active": registers.active,
        "needs_reset": transport.needs_reset_count,
        "queues": queues,
        **cells.report(device),
        "counters": dict(counters.values),
    }


class VirtioMetrics:
    """Brings what the virtio devices of one machine have counted into the metrics, which go on over restarts."""

    def __init__(self, metrics: Metrics, transports: Sequence[MmioTransport]) -> None:
        self._groups: list[tuple[Counters, Counters, Counters]] = []
        for device in [transport.device for transport in transports]:
            if device.kind == VIRTIO_ID_BLOCK:
                group = metrics.device("block", device.id)
            elif device.kind == VIRTIO_ID_ENTROPY:
                group = metrics["entropy"]
            else:
                continue
            self._groups.append((group, group.copy(), device.counters))

    def read(self) -> None:
        """Take over what the devices have counted, as far as their cells have told it."""
        for group, before, counted in self._groups:
            total = before.copy()
            total.merge(counted)
            group.values, group.aggregates = total.values, total.aggregates
