"""Block and pmem devices: /drives/{drive_id} and /pmem/{id}."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm.api.endpoints.table import IDS_DIFFER, Endpoint, RequestError, refuse_hotplug
from vmm.config.drives import DRIVE, DRIVE_UPDATE
from vmm.config.pmem import PMEM, PMEM_UPDATE
from vmm.config.rate_limiter import RateLimiterConfig

if TYPE_CHECKING:
    from vmm.config.drives import DriveConfig, DriveUpdate
    from vmm.config.pmem import PmemConfig, PmemUpdate
    from vmm.session import Session

_VERIFY = " Please verify the request arguments."


def _same_drive_id(rest: list[str], body: DriveConfig | DriveUpdate) -> None:
    if rest[0] != body.drive_id:
        raise RequestError(IDS_DIFFER)


def _same_pmem_id(rest: list[str], body: PmemConfig | PmemUpdate) -> None:
    if rest[0] != body.id:
        raise RequestError(IDS_DIFFER)


def _update_drive(session: Session, drive_id: str, update: DriveUpdate) -> None:
    vmm, path, limiter = session.machine, update.path_on_host, update.rate_limiter
    if path is None and limiter is None:
        vmm.update_vhost_user_block_config(drive_id)
    drives = session.resources.drives
    if path is not None:
        vmm.update_block_device_path(drive_id, path)
        drives.update(update._replace(rate_limiter=None))
    if limiter is not None:
        vmm.update_block_rate_limiter(drive_id, limiter.bandwidth, limiter.ops)
        drives.update(update._replace(path_on_host=None))


def _update_pmem(session: Session, device_id: str, update: PmemUpdate) -> None:
    limiter = update.rate_limiter or RateLimiterConfig()
    session.machine.update_pmem_rate_limiter(device_id, limiter.bandwidth, limiter.ops)


ENDPOINTS = (
    Endpoint(
        "PUT", "drives/{id}", DRIVE, lambda session, _id, config: session.resources.insert_drive(config),
        refuse_hotplug, "Drive config error", counted="drive", boot_specific=True, check=_same_drive_id,
        section="drives",
    ),
    Endpoint(
        "PATCH", "drives/{id}", DRIVE_UPDATE, None, _update_drive,
        "Drive config error: Unable to patch the block device", _VERIFY, counted="drive", check=_same_drive_id,
    ),
    Endpoint("DELETE", "drives/{id}", None, None, refuse_hotplug),
    Endpoint(
        "PUT", "pmem/{id}", PMEM, lambda session, _id, config: session.resources.insert_pmem(config),
        refuse_hotplug, "Pmem config error", counted="pmem", boot_specific=True, check=_same_pmem_id, section="pmem",
    ),
    Endpoint(
        "PATCH", "pmem/{id}", PMEM_UPDATE, None, _update_pmem,
        "Pmem config error: Unable to patch the pmem device", _VERIFY, counted="pmem", check=_same_pmem_id,
    ),
    Endpoint("DELETE", "pmem/{id}", None, None, refuse_hotplug),
)  # fmt: skip
