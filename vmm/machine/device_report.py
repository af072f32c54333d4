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


def read_virtio(metrics: Metrics, transports: Sequence[MmioTransport]) -> None:
    """Take over what virtio devices have counted, as far as their cells have told it."""
    for transport in transports:
        if transport.device.kind == VIRTIO_ID_ENTROPY:
            for key, value in transport.device.counters.values.items():
                metrics["entropy"].store(key, value)
