"""The operations of a running microVM on its devices, which ``vmm.machine.vmm.Vmm`` inherits.

Block devices can be changed while they run. There are none of the other kinds yet, so their operations say that there
is no such device; the devices' own changes fill them in. Sizes in MiB, times in s.
"""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING, NoReturn
from vmm.errors import DeviceError

if TYPE_CHECKING:
    from vmm.cells.device import CellDevice, Update
    from vmm.config.rate_limiter import TokenBucketConfig

NOT_FOUND = "Failed perform action on device: Device not found"


class DeviceNotFoundError(DeviceError):
    """There is no such device in this microVM."""

    code = "vmm.device_not_found"

    def __init__(self) -> None:
        super().__init__(NOT_FOUND)


def _not_found() -> NoReturn:
    raise DeviceNotFoundError


class DeviceOperations:
    """Each operation raises DeviceNotFoundError, or another DeviceError when it fails."""

    def block_device(self, drive_id: str) -> CellDevice | None:
        """Return the block device with this id."""
        return None

    def put_into_force(self, update: Update) -> None:
        """Wait for a change of a device. Raises DeviceError if it was refused."""
        raise NotImplementedError

    def update_block_device_path(self, drive_id: str, path_on_host: str) -> None:
        """Open another file behind a block device (PATCH /drives/{id} with ``path_on_host``)."""
        device = self.block_device(drive_id) or _not_found()
        if device.has_overlay:
            raise DeviceError("Block: a drive with an overlay keeps its files.")
        from vmm.machine.drives import open_for

        self.put_into_force(device.update_files((open_for(device, path_on_host).descriptor,)))

    def update_block_rate_limiter(
        self, drive_id: str, bandwidth: TokenBucketConfig | None, ops: TokenBucketConfig | None
    ) -> None:
        """Replace the buckets that are given (PATCH /drives/{id} with ``rate_limiter``)."""
        device = self.block_device(drive_id) or _not_found()
        from vmm.machine.drives import bucket

        self.put_into_force(device.update_limiter(bucket(bandwidth), bucket(ops)))

    def update_vhost_user_block_config(self, drive_id: str) -> None:
        """Read the backend's configuration again (PATCH /drives/{id} with neither)."""
        if self.block_device(drive_id) is None:
            _not_found()
        raise DeviceError("Block: Running method expected different backend.")

    def update_pmem_rate_limiter(
        self, device_id: str, bandwidth: TokenBucketConfig | None, ops: TokenBucketConfig | None
    ) -> None:
        """Replace the buckets that are given (PATCH /pmem/{id})."""
        _not_found()

    def update_net_rate_limiters(
        self,
        iface_id: str,
        rx_bandwidth: TokenBucketConfig | None,
        rx_ops: TokenBucketConfig | None,
        tx_bandwidth: TokenBucketConfig | None,
        tx_ops: TokenBucketConfig | None,
    ) -> None:
        """Replace the buckets that are given (PATCH /network-interfaces/{id})."""
        _not_found()

    def balloon_config(self) -> NoReturn:
        """Return the balloon's configuration (GET /balloon)."""
        _not_found()

    def latest_balloon_stats(self) -> NoReturn:
        """Return the last statistics of the guest (GET /balloon/statistics)."""
        _not_found()

    def update_balloon_config(self, amount_mib: int) -> None:
        """Set the target size (PATCH /balloon)."""
        _not_found()

    def update_balloon_stats_config(self, stats_polling_interval_s: int) -> None:
        """Set the polling interval (PATCH /balloon/statistics)."""
        _not_found()

    def start_balloon_hinting(self, acknowledge_on_stop: bool) -> None:
        """Begin a run of free page hinting (PATCH /balloon/hinting/start)."""
        _not_found()

    def get_balloon_hinting_status(self) -> NoReturn:
        """Return the state of the run (GET /balloon/hinting/status)."""
        _not_found()

    def stop_balloon_hinting(self) -> None:
        """End the run (PATCH /balloon/hinting/stop)."""
        _not_found()

    def memory_hotplug_status(self) -> NoReturn:
        """Return sizes of the memory hot-plug device (GET /hotplug/memory)."""
        _not_found()

    def update_memory_hotplug_size(self, requested_size_mib: int) -> None:
        """Set the requested size (PATCH /hotplug/memory)."""
        _not_found()
