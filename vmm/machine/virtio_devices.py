"""The virtio devices that a configuration asks for, each served by a device cell."""

from __future__ import annotations

from base.errors import CellblockError
from base.lean_typing import TYPE_CHECKING
from ipc.schema import pack
from virtio import entropy
from vmm.cells.device import CellDevice, DeviceModel
from vmm.machine.drives import block_device, bucket

if TYPE_CHECKING:
    from vmm.config.entropy import EntropyConfig
    from vmm.config.resources import VmResources

#: An entropy device has no name in the API.
ENTROPY_ID = "rng"


def virtio_devices(resources: VmResources) -> list[CellDevice]:
    """Return the devices, each kind in the order of its configuration. Raises VmmError, and none is left open then."""
    devices: list[CellDevice] = []
    try:
        for drive in resources.drives.configs:
            devices.append(block_device(drive, resources.options.boot_id))  # noqa: PERF401  (those before a bad one are to be closed)
        if resources.entropy is not None:
            devices.append(_entropy(resources.entropy))
    except CellblockError:
        for device in devices:
            device.close()
        raise
    return devices


def _entropy(config: EntropyConfig) -> CellDevice:
    limiter = config.rate_limiter
    bandwidth, ops = (None, None) if limiter is None else (limiter.bandwidth, limiter.ops)
    settings = entropy.EntropySettings(bucket(bandwidth), bucket(ops))
    return CellDevice(
        DeviceModel(
            kind=entropy.Entropy.kind,
            id=ENTROPY_ID,
            queue_sizes=(entropy.QUEUE_SIZE,),
            features=entropy.FEATURES,
            config=b"",
            settings=pack(entropy.ENTROPY_SETTINGS.check(settings, "settings")),
            section=entropy.Entropy.SECTION,
            counters=entropy.COUNTERS,
        )
    )
