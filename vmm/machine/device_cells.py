"""Attaches the virtio devices of a configuration to a machine that is being made, and starts their cells."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm.cells.device_pool import DeviceCells
from vmm.config.machine import DEVICE_CELLS_EACH
from vmm.devices.manager import in_attach_order
from vmm.errors import DeviceError
from vmm.machine.virtio_devices import virtio_devices

if TYPE_CHECKING:
    from base.event_manager import EventManager
    from vmm.cells.pool import WorkerPool
    from vmm.config.resources import VmResources
    from vmm.machine.assembly import Assembly


def attach(assembly: Assembly, resources: VmResources, pool: WorkerPool, events: EventManager) -> None:
    """Attach all devices and ask for their cells, which start while the kernel is loaded.

    Raises VmmError; what was made by then is closed with the machine.
    """
    vmm = assembly.vmm
    memory = vmm.vm.memory
    devices = in_attach_order(virtio_devices(resources))
    for number, device in enumerate(devices):
        try:
            device.transport = assembly.devices.attach_virtio(device, memory)
        except DeviceError:
            for unattached in devices[number:]:
                unattached.close()
            raise
    cells = DeviceCells(events, pool.device_cell, memory)
    vmm.device_cells = cells
    pool.on_device_cell_ended = cells.cell_ended
    cells.start(devices, each=resources.machine_config.device_cells == DEVICE_CELLS_EACH)
