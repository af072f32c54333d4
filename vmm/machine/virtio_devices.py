"""The virtio devices that a configuration asks for, each served by a device cell."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from ipc.schema import pack
from virtio import entropy
from virtio.rate_limiter import Bucket
from vmm.cells.device import CellDevice, DeviceModel

if TYPE_CHECKING:
    from vmm.config.entropy import EntropyConfig
    from vmm.config.rate_limiter import TokenBucketConfig
    from vmm.config.resources import VmResources

#: An entropy device has no name in the API.
ENTROPY_ID = "rng"


def virtio_devices(resources: VmResources) -> list[CellDevice]:
    """Return the devices, each kind in the order of its configuration."""
    return [*([_entropy(resources.entropy)] if resources.entropy is not None else [])]


def bucket(config: TokenBucketConfig | None) -> Bucket | None:
    """Return a limiter's bucket as devices have it."""
    return None if config is None else Bucket(config.size, config.refill_time, config.one_time_burst or 0)


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
