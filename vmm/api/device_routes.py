"""Paths of devices, snapshots and the metadata service: what each does with its body and the rest of its tokens."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm import actions
from vmm.api.request import BAD_JSON, ParsedRequest, RequestError, checked_id, decode_body, invalid_path, path_id
from vmm.config.balloon import BALLOON, BALLOON_STATS_UPDATE, BALLOON_UPDATE, START_HINTING
from vmm.config.drives import DRIVE, DRIVE_UPDATE
from vmm.config.entropy import ENTROPY
from vmm.config.memory_hotplug import MEMORY_HOTPLUG, MEMORY_HOTPLUG_UPDATE
from vmm.config.mmds import MMDS_CONFIG
from vmm.config.network import NETWORK, NETWORK_UPDATE
from vmm.config.pmem import PMEM, PMEM_UPDATE
from vmm.config.snapshot import CREATE_SNAPSHOT, LOAD_SNAPSHOT
from vmm.config.vsock import VSOCK
from vmm.cpu_config.template import CPU_TEMPLATE
from vmm.json.schema import ANYTHING
from vmm.mmds.store import V1

if TYPE_CHECKING:
    from base.lean_typing import Callable
    from vmm.config.snapshot import LoadSnapshotParams

    #: Take the tokens after the first one; None: there is no such path.
    WithoutBody = Callable[[list[str]], ParsedRequest | None]
    WithBody = Callable[[bytes, list[str]], ParsedRequest]

_IDS_DIFFER = "The id from the path does not match the id from the body!"


def _same_id(from_path: str, from_body: str) -> None:
    if from_path != from_body:
        raise RequestError(_IDS_DIFFER)


def _same_interface(from_path: str, from_body: str) -> None:
    if from_path != from_body:
        raise RequestError(f"The id from the path [{from_path}] does not match the id from the body [{from_body}]!")


def _put_drive(body: bytes, rest: list[str]) -> ParsedRequest:
    drive_id = path_id(rest)
    config = decode_body(DRIVE, body)
    _same_id(drive_id, config.drive_id)
    return ParsedRequest(actions.InsertDrive(config))


def _patch_drive(body: bytes, rest: list[str]) -> ParsedRequest:
    drive_id = path_id(rest)
    update = decode_body(DRIVE_UPDATE, body)
    _same_id(drive_id, update.drive_id)
    return ParsedRequest(actions.UpdateDrive(update))


def _put_pmem(body: bytes, rest: list[str]) -> ParsedRequest:
    device_id = path_id(rest)
    config = decode_body(PMEM, body)
    _same_id(device_id, config.id)
    return ParsedRequest(actions.InsertPmem(config))


def _patch_pmem(body: bytes, rest: list[str]) -> ParsedRequest:
    device_id = path_id(rest)
    update = decode_body(PMEM_UPDATE, body)
    _same_id(device_id, update.id)
    return ParsedRequest(actions.UpdatePmem(update))


def _put_network(body: bytes, rest: list[str]) -> ParsedRequest:
    iface_id = path_id(rest)
    config = decode_body(NETWORK, body)
    _same_interface(iface_id, config.iface_id)
    return ParsedRequest(actions.InsertNetworkInterface(config))


def _patch_network(body: bytes, rest: list[str]) -> ParsedRequest:
    iface_id = path_id(rest)
    update = decode_body(NETWORK_UPDATE, body)
    _same_interface(iface_id, update.iface_id)
    return ParsedRequest(actions.UpdateNetworkInterface(update))


def _delete(kind: str) -> WithoutBody:
    return lambda rest: ParsedRequest(actions.RemoveDevice(kind, path_id(rest)))


def _put_vsock(body: bytes, _rest: list[str]) -> ParsedRequest:
    config = decode_body(VSOCK, body)
    if config.vsock_id is None:
        return ParsedRequest(actions.SetVsock(config))
    checked_id(config.vsock_id)
    return ParsedRequest(actions.SetVsock(config), "PUT /vsock: vsock_id field is deprecated.")


def _put_entropy(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.SetEntropy(decode_body(ENTROPY, body)))


# -- balloon ----------------------------------------------------------------------------------------------------------


def _get_balloon(rest: list[str]) -> ParsedRequest:
    if not rest:
        return ParsedRequest(actions.GetBalloon())
    if rest[0] == "statistics":
        return ParsedRequest(actions.GetBalloonStatistics())
    if rest[:2] == ["hinting", "status"]:
        return ParsedRequest(actions.GetBalloonHinting())
    raise RequestError(f"Unrecognized GET request path `{_last_known(rest)}`.")


def _put_balloon(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.SetBalloon(decode_body(BALLOON, body)))


def _patch_balloon(body: bytes, rest: list[str]) -> ParsedRequest:
    if not rest:
        return ParsedRequest(actions.UpdateBalloon(decode_body(BALLOON_UPDATE, body)))
    if rest[0] == "statistics":
        return ParsedRequest(actions.UpdateBalloonStatistics(decode_body(BALLOON_STATS_UPDATE, body)))
    if rest[:2] == ["hinting", "start"]:
        return ParsedRequest(actions.StartBalloonHinting(decode_body(START_HINTING, body)))
    if rest[:2] == ["hinting", "stop"]:
        return ParsedRequest(actions.StopBalloonHinting())
    raise RequestError(f"Unrecognized PATCH request path `{_last_known(rest)}`.")


def _patch_balloon_without_body(rest: list[str]) -> ParsedRequest | None:
    """Hinting is the one thing that is changed without a body."""
    if rest[:2] == ["hinting", "start"]:
        return ParsedRequest(actions.StartBalloonHinting(config=True))
    return ParsedRequest(actions.StopBalloonHinting()) if rest[:2] == ["hinting", "stop"] else None


def _last_known(rest: list[str]) -> str:
    return rest[1] if rest[0] == "hinting" and len(rest) > 1 else rest[0]


# -- memory hot-plug --------------------------------------------------------------------------------------------------


def _get_hotplug(rest: list[str]) -> ParsedRequest | None:
    return ParsedRequest(actions.GetMemoryHotplug()) if rest[:1] == ["memory"] else None


def _put_hotplug(body: bytes, rest: list[str]) -> ParsedRequest:
    if rest[:1] != ["memory"]:
        invalid_path("PUT", "hotplug")
    return ParsedRequest(actions.SetMemoryHotplug(decode_body(MEMORY_HOTPLUG, body)))


def _patch_hotplug(body: bytes, rest: list[str]) -> ParsedRequest:
    if rest[:1] != ["memory"]:
        invalid_path("PATCH", "hotplug")
    return ParsedRequest(actions.UpdateMemoryHotplug(decode_body(MEMORY_HOTPLUG_UPDATE, body)))


# -- CPU, metadata, snapshots -----------------------------------------------------------------------------------------


def _put_cpu_config(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.SetCpuTemplate(decode_body(CPU_TEMPLATE, body)))


def _put_mmds(body: bytes, rest: list[str]) -> ParsedRequest:
    if not rest:
        return ParsedRequest(actions.PutMmds(decode_body(ANYTHING, body)))
    if rest[0] != "config":
        raise RequestError(f"Unrecognized PUT request path `{rest[0]}`.")
    config = decode_body(MMDS_CONFIG, body)
    deprecation = "PUT /mmds/config: V1 is deprecated. Use V2 instead." if config.version == V1 else None
    return ParsedRequest(actions.SetMmdsConfig(config), deprecation)


def _patch_mmds(body: bytes, _rest: list[str]) -> ParsedRequest:
    return ParsedRequest(actions.PatchMmds(decode_body(ANYTHING, body)))


def _put_snapshot(body: bytes, rest: list[str]) -> ParsedRequest:
    if not rest:
        raise RequestError("Missing snapshot operation type.")
    if rest[0] == "create":
        return ParsedRequest(actions.CreateSnapshot(decode_body(CREATE_SNAPSHOT, body)))
    if rest[0] != "load":
        invalid_path("PUT", f"/snapshot/{rest[0]}")
    params = decode_body(LOAD_SNAPSHOT, body)
    if params.mem_backend is not None and params.mem_file_path is not None:
        raise RequestError(
            f"{BAD_JSON}too many fields: either `mem_backend` or `mem_file_path` exclusively is required."
        )
    if params.mem_backend is None and params.mem_file_path is None:
        raise RequestError(f"{BAD_JSON}missing field: either `mem_backend` or `mem_file_path` is required.")
    return ParsedRequest(actions.LoadSnapshot(params), _load_deprecation(params))


def _load_deprecation(params: LoadSnapshotParams) -> str | None:
    fields = [
        name
        for name, used in (
            ("mem_file_path", params.mem_file_path is not None),
            ("enable_diff_snapshots", params.enable_diff_snapshots),
        )
        if used
    ]
    if not fields:
        return None
    verb = "field is" if len(fields) == 1 else "fields are"
    return f"PUT /snapshot/load: {' and '.join(fields)} {verb} deprecated."


WITHOUT_BODY: dict[tuple[str, str], WithoutBody] = {
    ("GET", "balloon"): _get_balloon,
    ("PATCH", "balloon"): _patch_balloon_without_body,
    ("GET", "hotplug"): _get_hotplug,
    ("GET", "mmds"): lambda _rest: ParsedRequest(actions.GetMmds()),
    ("DELETE", "drives"): _delete("drives"),
    ("DELETE", "network-interfaces"): _delete("network-interfaces"),
    ("DELETE", "pmem"): _delete("pmem"),
}
WITH_BODY: dict[tuple[str, str], WithBody] = {
    ("PUT", "balloon"): _put_balloon,
    ("PATCH", "balloon"): _patch_balloon,
    ("PUT", "cpu-config"): _put_cpu_config,
    ("PUT", "drives"): _put_drive,
    ("PATCH", "drives"): _patch_drive,
    ("PUT", "entropy"): _put_entropy,
    ("PUT", "hotplug"): _put_hotplug,
    ("PATCH", "hotplug"): _patch_hotplug,
    ("PUT", "mmds"): _put_mmds,
    ("PATCH", "mmds"): _patch_mmds,
    ("PUT", "network-interfaces"): _put_network,
    ("PATCH", "network-interfaces"): _patch_network,
    ("PUT", "pmem"): _put_pmem,
    ("PATCH", "pmem"): _patch_pmem,
    ("PUT", "snapshot"): _put_snapshot,
    ("PUT", "vsock"): _put_vsock,
}
