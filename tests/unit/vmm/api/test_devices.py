"""Endpoints of devices, snapshots and CPU templates: state × body → status and exact text."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.harness.api import Api

JSON = "An error occurred when deserializing the json body of a request: "
PREBOOT = "The requested operation is not supported before starting the microVM."
POSTBOOT = "The requested operation is not supported after starting the microVM."
NO_DEVICE = "Failed perform action on device: Device not found"
NO_PCI = "PCI is not enabled"
VERIFY = " Please verify the request arguments."
BUCKET = {"size": 1000, "refill_time": 100}
SHOWN_BUCKET = {"size": 1000, "one_time_burst": None, "refill_time": 100}
DRIVE = {"drive_id": "a", "is_root_device": False, "path_on_host": "KERNEL"}
PMEM = {"id": "a", "path_on_host": "nix"}
NET = {"iface_id": "eth0", "host_dev_name": "tap0"}
MMDS = {"network_interfaces": ["eth0"], "version": "V2"}
SNAPSHOT = {"snapshot_path": "s", "mem_file_path": "m"}
LOAD = {"snapshot_path": "s", "mem_backend": {"backend_path": "m", "backend_type": "File"}}
NOT_YET = "Snapshots are not yet supported."

#: (method, path, body, before the start, while running, while paused); a number is the status of a success.
STATES: list[Any] = [
    ("PUT", "/drives/a", DRIVE, 204, NO_PCI, NO_PCI),
    ("PATCH", "/drives/a", {"drive_id": "a", "path_on_host": "x"}, PREBOOT,
     *[f"Drive config error: Unable to patch the block device: {NO_DEVICE}{VERIFY}"] * 2),
    ("PATCH", "/drives/a", {"drive_id": "a", "rate_limiter": {"ops": BUCKET}}, PREBOOT,
     *[f"Drive config error: Unable to patch the block device: {NO_DEVICE}{VERIFY}"] * 2),
    ("PATCH", "/drives/a", {"drive_id": "a"}, PREBOOT,
     *[f"Drive config error: Unable to patch the block device: {NO_DEVICE}{VERIFY}"] * 2),
    ("DELETE", "/drives/a", None, PREBOOT, NO_PCI, NO_PCI),
    ("PUT", "/pmem/a", PMEM, 204, NO_PCI, NO_PCI),
    ("PATCH", "/pmem/a", {"id": "a", "rate_limiter": {}}, PREBOOT,
     *[f"Pmem config error: Unable to patch the pmem device: {NO_DEVICE}{VERIFY}"] * 2),
    ("DELETE", "/pmem/a", None, PREBOOT, NO_PCI, NO_PCI),
    ("PUT", "/network-interfaces/eth0", NET, 204, NO_PCI, NO_PCI),
    ("PATCH", "/network-interfaces/eth0", {"iface_id": "eth0"}, PREBOOT,
     *[f"Network config error: Unable to update the net device: {NO_DEVICE}"] * 2),
    ("DELETE", "/network-interfaces/eth0", None, PREBOOT, NO_PCI, NO_PCI),
    ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v"}, 204, POSTBOOT, POSTBOOT),
    ("PUT", "/entropy", {}, 204, POSTBOOT, POSTBOOT),
    ("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": False}, 204, POSTBOOT, POSTBOOT),
    ("GET", "/balloon", None, "Balloon config error: No balloon device found.",
     *[f"Internal VMM error: {NO_DEVICE}"] * 2),
    ("PATCH", "/balloon", {"amount_mib": 1}, PREBOOT, *[f"Balloon update error: {NO_DEVICE}"] * 2),
    ("GET", "/balloon/statistics", None, PREBOOT, *[f"Internal VMM error: {NO_DEVICE}"] * 2),
    ("PATCH", "/balloon/statistics", {"stats_polling_interval_s": 1}, PREBOOT,
     *[f"Balloon update error: {NO_DEVICE}"] * 2),
    ("PATCH", "/balloon/hinting/start", {"acknowledge_on_stop": False, "more": 1}, PREBOOT,
     *[f"Balloon update error: {NO_DEVICE}"] * 2),
    ("PATCH", "/balloon/hinting/start", None, PREBOOT, *[f"Balloon update error: {NO_DEVICE}"] * 2),
    ("GET", "/balloon/hinting/status", None, PREBOOT, *[f"Balloon update error: {NO_DEVICE}"] * 2),
    ("PATCH", "/balloon/hinting/stop", None, PREBOOT, *[f"Balloon update error: {NO_DEVICE}"] * 2),
    ("PATCH", "/balloon/hinting/stop", {}, PREBOOT, *[f"Balloon update error: {NO_DEVICE}"] * 2),
    ("PUT", "/hotplug/memory", {"total_size_mib": 128}, 204, POSTBOOT, POSTBOOT),
    ("GET", "/hotplug/memory", None, PREBOOT, *[f"Internal VMM error: {NO_DEVICE}"] * 2),
    ("PATCH", "/hotplug/memory", {"requested_size_mib": 2}, PREBOOT,
     *[f"Memory hotplug update error: {NO_DEVICE}"] * 2),
    ("PUT", "/cpu-config", {}, 204, POSTBOOT, POSTBOOT),
    ("PUT", "/mmds/config", MMDS,
     ("MMMDS config error: The list of network interface IDs provided contains at least one ID that does not "
     "correspond to any existing network interface."), POSTBOOT, POSTBOOT),
    ("GET", "/mmds", None, 200, 200, 200),
    ("PUT", "/mmds", {"a": 1}, 204, *["MMDS error: The MMDS data store is not initialized."] * 2),
    ("PATCH", "/mmds", {"a": 1}, *["MMDS error: The MMDS data store is not initialized."] * 3),
    ("PUT", "/metrics", {"metrics_path": "METRICS"}, 204, POSTBOOT, POSTBOOT),
    ("GET", "/metrics/prometheus", None, 200, 200, 200),
    ("PUT", "/snapshot/create", SNAPSHOT, PREBOOT,
     "Create snapshot error: Operation not allowed: save/restore unavailable while running",
     f"Create snapshot error: {NOT_YET}"),
    ("PUT", "/snapshot/load", LOAD, f"Load snapshot error: {NOT_YET}", POSTBOOT, POSTBOOT),
]  # fmt: skip


def _check(api: Api, kernel: str, tmp_path, case: Any, expected: int | str) -> None:
    method, path, body = case[:3]
    data = None
    if body is not None:
        text = json.dumps(body).replace("KERNEL", kernel).replace("METRICS", str(tmp_path / "metrics"))
        data = text.encode()
    status, reply = api.send(method, path, data)
    if isinstance(expected, str):
        assert (status, reply) == (400, {"fault_message": expected})
    else:
        assert status == expected, reply
        assert (reply is None) == (status == 204)


def _name(case: Any) -> str:
    return f"{case[0]} {case[1]} {case[2]}"


@pytest.mark.parametrize("case", STATES, ids=_name)
def test_before_the_start(api, kernel, tmp_path, case):
    _check(api, kernel, tmp_path, case, case[3])


@pytest.mark.parametrize("case", STATES, ids=_name)
def test_while_running(running, kernel, tmp_path, case):
    _check(running, kernel, tmp_path, case, case[4])


@pytest.mark.parametrize("case", STATES, ids=_name)
def test_while_paused(running, kernel, tmp_path, case):
    assert running.send("PATCH", "/vm", {"state": "Paused"}) == (204, None)
    _check(running, kernel, tmp_path, case, case[5])


DRIVE_FIELDS = (
    "one of `drive_id`, `partuuid`, `is_root_device`, `cache_type`, `is_read_only`, `path_on_host`, `rate_limiter`, "
    "`io_engine`, `socket`"
)
NET_FIELDS = "one of `iface_id`, `host_dev_name`, `guest_mac`, `mtu`, `rx_rate_limiter`, `tx_rate_limiter`"
IDS = "The id from the path does not match the id from the body!"
BAD_ID = "API Resource IDs can only contain alphanumeric characters and underscores."
BLOCK = "Drive config error: Unable to create the virtio block device: "
FILE = f"{BLOCK}Virtio backend error: Error manipulating the backing file: "
TAP = "Network config error: Could not create the network device: Open tap device failed: "
HOTPLUG = "Memory hotplug config error: "
FIELDS_5 = "`amount_mib`, `deflate_on_oom`, `stats_polling_interval_s`, `free_page_hinting`, `free_page_reporting`"
TYPES = "Make sure to prefix the number with '0x' for hexadecimal numbers or '0b' for binary numbers."
#: (method, path, body, fault message); all but those that begin with a prefix come before the state is looked at.
BAD_BODIES: list[tuple[str, str, str, str]] = [
    # missing, unknown, wrong type, out of range: drives
    ("PUT", "/drives/a", "{}", f"{JSON}missing field `drive_id` at line 1 column 2."),
    ("PUT", "/drives/a", '{"drive_id": "a"}', f"{JSON}missing field `is_root_device` at line 1 column 17."),
    ("PUT", "/drives/a", '{"x": 1}', f"{JSON}unknown field `x`, expected {DRIVE_FIELDS} at line 1 column 4."),
    ("PUT", "/drives/a", '{"drive_id": 1}', f"{JSON}invalid type: integer `1`, expected a string at line 1 column 14."),
    ("PUT", "/drives/a", '{"cache_type": "Full"}',
     f"{JSON}unknown variant `Full`, expected `Unsafe` or `Writeback` at line 1 column 21."),
    ("PUT", "/drives/a", '{"io_engine": "IO"}',
     f"{JSON}unknown variant `IO`, expected `Async` or `Sync` at line 1 column 18."),
    ("PUT", "/drives/a", '{"rate_limiter": {"bytes": {}}}',
     f"{JSON}unknown field `bytes`, expected `bandwidth` or `ops` at line 1 column 25."),
    ("PUT", "/drives/a", '{"rate_limiter": {"ops": {"size": 1}}}',
     f"{JSON}missing field `refill_time` at line 1 column 36."),
    ("PUT", "/drives/a", '{"rate_limiter": {"ops": {"size": 18446744073709551616, "refill_time": 1}}}',
     f"{JSON}invalid type: floating point `1.8446744073709552e+19`, expected u64 at line 1 column 54."),
    ("PUT", "/drives/b", '{"drive_id": "a", "is_root_device": true}', IDS),
    ("PUT", "/drives/", '{"drive_id": "a", "is_root_device": true}', "The ID cannot be empty."),
    ("PUT", "/drives", "x", "The ID cannot be empty."),
    ("PUT", "/drives/a-b", "x", BAD_ID),
    ("DELETE", "/drives", "", "The ID cannot be empty."),
    ("DELETE", "/drives/a.b", "", BAD_ID),
    ("PUT", "/drives/a", '{"drive_id": "a", "is_root_device": true}', f"{BLOCK}Invalid block config."),
    ("PUT", "/drives/a", '{"drive_id": "a", "is_root_device": true, "path_on_host": "x", "socket": "y"}',
     f"{BLOCK}Invalid block config."),
    ("PUT", "/drives/a", '{"drive_id": "a", "is_root_device": true, "socket": "y", "is_read_only": false}',
     f"{BLOCK}Invalid block config."),
    ("PUT", "/drives/a", '{"drive_id": "a", "is_root_device": true, "socket": "y", "io_engine": "Sync"}',
     f"{BLOCK}Invalid block config."),
    ("PUT", "/drives/a", '{"drive_id": "a", "is_root_device": true, "path_on_host": "foo.bar"}',
     f"{FILE}No such file or directory (os error 2) foo.bar"),
    ("PUT", "/drives/a", '{"drive_id": "a", "is_root_device": true, "path_on_host": "/"}',
     f"{FILE}Is a directory (os error 21) /"),
    ("PUT", "/drives/a", '{"drive_id": "a", "is_root_device": true, "path_on_host": "/dev/null"}',
     f"{FILE}not a regular file /dev/null"),
    ("PATCH", "/drives/a", '{"drive_id": "a", "is_read_only": true}',
     (f"{JSON}unknown field `is_read_only`, expected one of `drive_id`, `path_on_host`, `rate_limiter` "
     "at line 1 column 32.")),
    ("PATCH", "/drives/b", '{"drive_id": "a"}', IDS),
    # pmem
    ("PUT", "/pmem/a", '{"id": "a"}', f"{JSON}missing field `path_on_host` at line 1 column 11."),
    ("PUT", "/pmem/a", '{"root_device": 1}',
     f"{JSON}invalid type: integer `1`, expected a boolean at line 1 column 17."),
    ("PUT", "/pmem/a", '{"y": 1}', (f"{JSON}unknown field `y`, expected one of `id`, `path_on_host`, `root_device`, "
     "`read_only`, `rate_limiter` at line 1 column 4.")),
    ("PUT", "/pmem/b", '{"id": "a", "path_on_host": "x"}', IDS),
    ("PATCH", "/pmem/b", '{"id": "a"}', IDS),
    ("PATCH", "/pmem/a", '{"id": "a", "path_on_host": "x"}',
     f"{JSON}unknown field `path_on_host`, expected `id` or `rate_limiter` at line 1 column 26."),
    ("DELETE", "/pmem/", "", "The ID cannot be empty."),
    # network interfaces
    ("PUT", "/network-interfaces/a", '{"iface_id": "a"}', f"{JSON}missing field `host_dev_name` at line 1 column 17."),
    ("PUT", "/network-interfaces/a", '{"z": 1}',
     f"{JSON}unknown field `z`, expected {NET_FIELDS} at line 1 column 4."),
    ("PUT", "/network-interfaces/a", '{"guest_mac": "AA:FC:00:00:00"}',
     f"{JSON}The provided MAC address is invalid. at line 1 column 31."),
    ("PUT", "/network-interfaces/a", '{"guest_mac": "AA:FC:00:00:00:0g"}',
     f"{JSON}The provided MAC address is invalid. at line 1 column 34."),
    ("PUT", "/network-interfaces/a", '{"mtu": 65536}',
     f"{JSON}invalid value: integer `65536`, expected u16 at line 1 column 13."),
    ("PUT", "/network-interfaces/a", '{"iface_id": "a", "host_dev_name": "t", "mtu": 67}',
     "Network config error: The MTU 67 is too small: it must be from 68 to 65535."),
    ("PUT", "/network-interfaces/a", '{"iface_id": "a", "host_dev_name": "t123456789012345"}',
     f"{TAP}Invalid interface name"),
    ("PUT", "/network-interfaces/a", '{"iface_id": "a", "host_dev_name": ""}', f"{TAP}Invalid interface name"),
    ("PUT", "/network-interfaces/b", '{"iface_id": "a", "host_dev_name": "t"}',
     "The id from the path [b] does not match the id from the body [a]!"),
    ("PATCH", "/network-interfaces/b", '{"iface_id": "a"}',
     "The id from the path [b] does not match the id from the body [a]!"),
    ("PATCH", "/network-interfaces/a", '{"iface_id": "a", "host_dev_name": "t"}',
     (f"{JSON}unknown field `host_dev_name`, expected one of `iface_id`, `rx_rate_limiter`, `tx_rate_limiter` "
     "at line 1 column 33.")),
    # vsock
    ("PUT", "/vsock", '{"guest_cid": 3}', f"{JSON}missing field `uds_path` at line 1 column 16."),
    ("PUT", "/vsock", '{"guest_cid": -1}',
     f"{JSON}invalid value: integer `-1`, expected u32 at line 1 column 16."),
    ("PUT", "/vsock", '{"guest_cid": 4294967296}',
     f"{JSON}invalid value: integer `4294967296`, expected u32 at line 1 column 24."),
    ("PUT", "/vsock", '{"guest_cid": 2, "uds_path": "v"}',
     "Vsock config error: The guest CID 2 is reserved: it must be at least 3."),
    ("PUT", "/vsock", '{"guest_cid": 3, "uds_path": "v", "vsock_id": "a-b"}', BAD_ID),
    ("PUT", "/vsock", '{"cid": 3}',
     f"{JSON}unknown field `cid`, expected one of `vsock_id`, `guest_cid`, `uds_path` at line 1 column 6."),
    # entropy
    ("PUT", "/entropy", '{"rate": 1}', f"{JSON}unknown field `rate`, expected `rate_limiter` at line 1 column 7."),
    ("PUT", "/entropy", '{"rate_limiter": 1}',
     f"{JSON}invalid type: integer `1`, expected struct RateLimiterConfig at line 1 column 18."),
    # balloon
    ("PUT", "/balloon", '{"amount_mib": 1}', f"{JSON}missing field `deflate_on_oom` at line 1 column 17."),
    ("PUT", "/balloon", '{"amount": 1}', (f"{JSON}unknown field `amount`, expected one of {FIELDS_5} "
     "at line 1 column 9.")),
    ("PUT", "/balloon", '{"amount_mib": 4294967296}',
     f"{JSON}invalid value: integer `4294967296`, expected u32 at line 1 column 25."),
    ("PUT", "/balloon", '{"stats_polling_interval_s": 65536}',
     f"{JSON}invalid value: integer `65536`, expected u16 at line 1 column 34."),
    ("PUT", "/balloon", '{"amount_mib": 129, "deflate_on_oom": true}',
     "Balloon config error: Amount of pages requested is too large."),
    ("PATCH", "/balloon", '{"amount_mib": -1}',
     f"{JSON}invalid value: integer `-1`, expected u32 at line 1 column 17."),
    ("PATCH", "/balloon", '{"deflate_on_oom": true}',
     f"{JSON}unknown field `deflate_on_oom`, expected `amount_mib` at line 1 column 17."),
    ("PATCH", "/balloon/statistics", "{}", f"{JSON}missing field `stats_polling_interval_s` at line 1 column 2."),
    ("PATCH", "/balloon/hinting/start", '{"acknowledge_on_stop": 1}',
     f"{JSON}invalid type: integer `1`, expected a boolean at line 1 column 25."),
    ("PATCH", "/balloon/foo", "{}", "Unrecognized PATCH request path `foo`."),
    ("PATCH", "/balloon/hinting/foo", "{}", "Unrecognized PATCH request path `foo`."),
    ("PATCH", "/balloon", "", "Empty PATCH request."),
    ("GET", "/balloon/foo", "", "Unrecognized GET request path `foo`."),
    ("GET", "/balloon/hinting", "", "Unrecognized GET request path `hinting`."),
    # memory hot-plug
    ("PUT", "/hotplug/memory", "{}", f"{JSON}missing field `total_size_mib` at line 1 column 2."),
    ("PUT", "/hotplug/memory", '{"total_size_mib": "1"}',
     f'{JSON}invalid type: string "1", expected u32 at line 1 column 22.'),
    ("PUT", "/hotplug/memory", '{"total_size_mib": 4294967296}',
     f"{JSON}invalid value: integer `4294967296`, expected u32 at line 1 column 29."),
    ("PUT", "/hotplug/memory", '{"total_size_mib": 128, "block_size_mib": 1}',
     f"{HOTPLUG}Block size must not be lower than 2 MiB"),
    ("PUT", "/hotplug/memory", '{"total_size_mib": 128, "block_size_mib": 3}',
     f"{HOTPLUG}Block size must be a power of 2"),
    ("PUT", "/hotplug/memory", '{"total_size_mib": 128, "slot_size_mib": 127}',
     f"{HOTPLUG}Slot size must not be lower than 128 MiB"),
    ("PUT", "/hotplug/memory", '{"total_size_mib": 130, "block_size_mib": 4, "slot_size_mib": 130}',
     f"{HOTPLUG}Slot size must be a multiple of block size (4 MiB)"),
    ("PUT", "/hotplug/memory", '{"total_size_mib": 127}',
     f"{HOTPLUG}Total size must not be lower than slot size (128 MiB)"),
    ("PUT", "/hotplug/memory", '{"total_size_mib": 129}',
     f"{HOTPLUG}Total size must be a multiple of slot size (128 MiB)"),
    ("PUT", "/hotplug/disk", "{}", "Invalid request method and/or path: PUT hotplug."),
    ("PATCH", "/hotplug", "{}", "Invalid request method and/or path: PATCH hotplug."),
    ("PATCH", "/hotplug/memory", "{}", f"{JSON}missing field `requested_size_mib` at line 1 column 2."),
    # CPU templates
    ("PUT", "/cpu-config", '{"reg_modifiers": []}',
     (f"{JSON}unknown field `reg_modifiers`, expected one of `kvm_capabilities`, `cpuid_modifiers`, `msr_modifiers` "
     "at line 1 column 16.")),
    ("PUT", "/cpu-config", '{"kvm_capabilities": ["x"]}',
     (f"{JSON}Failed to parse string [x] as a kvm capability - can not convert to numeric: invalid digit found in "
     "string at line 1 column 26.")),
    ("PUT", "/cpu-config", '{"kvm_capabilities": ["!"]}',
     (f"{JSON}Failed to parse string [!] as a kvm capability - can not convert to numeric: cannot parse integer from "
     "empty string at line 1 column 26.")),
    ("PUT", "/cpu-config", '{"kvm_capabilities": ["4294967296"]}',
     (f"{JSON}Failed to parse string [4294967296] as a kvm capability - can not convert to numeric: number too large "
     "to fit in target type at line 1 column 35.")),
    ("PUT", "/cpu-config", '{"msr_modifiers": [{"addr": "10", "bitmap": "0b1"}]}',
     f"{JSON}No supported number system prefix found in value [10]. {TYPES} at line 1 column 32."),
    ("PUT", "/cpu-config", '{"msr_modifiers": [{"addr": "0xg", "bitmap": "0b1"}]}',
     (f"{JSON}Failed to parse string [0xg] as a number for CPU template - ParseIntError {{ kind: InvalidDigit }} "
     "at line 1 column 33.")),
    ("PUT", "/cpu-config", '{"cpuid_modifiers": [{"leaf": "0x1", "modifiers": [{"register": "esi"}]}]}',
     f"{JSON}Invalid CPUID register. Must be one of [eax, ebx, ecx, edx] at line 1 column 70."),
    # metadata service
    ("PUT", "/mmds/foo", "{}", "Unrecognized PUT request path `foo`."),
    ("PUT", "/mmds", "{", f"{JSON}EOF while parsing an object at line 1 column 1."),
    ("PUT", "/mmds/config", '{"version": "V2"}', f"{JSON}missing field `network_interfaces` at line 1 column 17."),
    ("PUT", "/mmds/config", '{"version": "V3"}',
     f"{JSON}unknown variant `V3`, expected `V1` or `V2` at line 1 column 16."),
    ("PUT", "/mmds/config", '{"network_interfaces": [], "ipv4_address": "169.254.1"}',
     f"{JSON}invalid IPv4 address syntax at line 1 column 55."),
    ("PUT", "/mmds/config", '{"network_interfaces": [], "version": "V2"}',
     "MMMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty."),
    ("PUT", "/mmds/config", '{"network_interfaces": ["x"], "ipv4_address": "169.254.0.1"}',
     "MMMDS config error: The MMDS IPv4 address is not link local."),
    ("PUT", "/mmds/config", '{"network_interfaces": ["x"], "ipv4_address": "10.0.0.1"}',
     "MMMDS config error: The MMDS IPv4 address is not link local."),
    # snapshots
    ("PUT", "/snapshot", "{}", "Missing snapshot operation type."),
    ("PUT", "/snapshot/foo", "{}", "Invalid request method and/or path: PUT /snapshot/foo."),
    ("PUT", "/snapshot/create", '{"snapshot_path": "s"}',
     f"{JSON}missing field `mem_file_path` at line 1 column 22."),
    ("PUT", "/snapshot/create", '{"snapshot_type": "Half"}',
     f"{JSON}unknown variant `Half`, expected `Diff` or `Full` at line 1 column 24."),
    ("PUT", "/snapshot/load", '{"snapshot_path": "s"}',
     f"{JSON}missing field: either `mem_backend` or `mem_file_path` is required."),
    ("PUT", "/snapshot/load",
     '{"snapshot_path": "s", "mem_file_path": "m", "mem_backend": {"backend_path": "m", "backend_type": "Uffd"}}',
     f"{JSON}too many fields: either `mem_backend` or `mem_file_path` exclusively is required."),
    ("PUT", "/snapshot/load", '{"snapshot_path": "s", "mem_backend": {"backend_path": "m"}}',
     f"{JSON}missing field `backend_type` at line 1 column 59."),
    ("PUT", "/snapshot/load", '{"huge_pages": "1G"}',
     f"{JSON}unknown variant `1G`, expected one of `Snapshot`, `None`, `Transparent`, `2M` at line 1 column 19."),
    # metrics
    ("PUT", "/metrics", "{}", f"{JSON}missing field `metrics_path` at line 1 column 2."),
    ("PUT", "/metrics", '{"properties": {"a": 1}}',
     f"{JSON}invalid type: integer `1`, expected a string at line 1 column 22."),
    ("PUT", "/metrics", '{"properties": []}', f"{JSON}invalid type: sequence, expected a map at line 1 column 15."),
    ("PUT", "/metrics", '{"metrics_path": "/nix/metrics"}',
     ("Metrics error: Cannot initialize the metrics system due to bad user input: "
     "No such file or directory (os error 2)")),
    ("GET", "/metrics", "", "Invalid request method and/or path: GET metrics."),
]  # fmt: skip


def _body(text: str) -> bytes | None:
    return text.encode() or None


@pytest.mark.parametrize("case", BAD_BODIES, ids=lambda case: f"{case[0]} {case[1]} {case[2][:60]}")
def test_a_request_that_is_refused_changes_nothing(api, case):
    method, path, body, message = case
    before = api.config()
    assert api.fault(method, path, _body(body)) == message
    assert api.config() == before
    assert not api.metrics.configured


PARSED = ("An error occurred", "The I", "The id", "API Resource", "Empty", "Unrecog", "Invalid request", "Missing")


@pytest.mark.parametrize(
    "case",
    [case for case in BAD_BODIES if case[3].startswith(PARSED)],
    ids=lambda case: f"{case[0]} {case[1]} {case[2][:60]}",
)
def test_the_body_is_looked_at_before_the_state(running, case):
    assert running.fault(case[0], case[1], _body(case[2])) == case[3]


# -- numbers at their limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/vsock", {"guest_cid": 3, "uds_path": "v"}),
        ("/vsock", {"guest_cid": (1 << 32) - 1, "uds_path": "v"}),
        ("/balloon", {"amount_mib": 128, "deflate_on_oom": True, "stats_polling_interval_s": 65535}),
        ("/network-interfaces/a", {"iface_id": "a", "host_dev_name": "t", "mtu": 68}),
        ("/network-interfaces/a", {"iface_id": "a", "host_dev_name": "t23456789012345", "mtu": 65535}),
        ("/hotplug/memory", {"total_size_mib": 128, "block_size_mib": 2, "slot_size_mib": 128}),
        ("/hotplug/memory", {"total_size_mib": 1 << 31, "block_size_mib": 1 << 31, "slot_size_mib": 1 << 31}),
        ("/entropy", {"rate_limiter": {"ops": {"size": (1 << 64) - 1, "refill_time": 1, "one_time_burst": 0}}}),
    ],
)
def test_values_at_their_limits_are_taken(api, path, body):
    assert api.send("PUT", path, body) == (204, None)


# -- what is stored, and how it is shown ------------------------------------------------------------------------------


def test_drives_are_shown_with_the_root_first(api, kernel):
    data = {"drive_id": "data", "is_root_device": False, "path_on_host": kernel, "is_read_only": True,
            "cache_type": "Writeback", "io_engine": "Async", "partuuid": None,
            "rate_limiter": {"bandwidth": BUCKET, "ops": {"size": 0, "refill_time": 1}}}  # fmt: skip
    root = {"drive_id": "root", "is_root_device": True, "path_on_host": kernel, "partuuid": "0-1"}
    backend = {"drive_id": "vub", "is_root_device": False, "socket": "s"}
    for drive in (data, root, backend):
        assert api.send("PUT", f"/drives/{drive['drive_id']}", drive) == (204, None)
    assert api.config()["drives"] == [
        {"drive_id": "root", "partuuid": "0-1", "is_root_device": True, "cache_type": "Unsafe", "is_read_only": False,
         "path_on_host": kernel, "rate_limiter": None, "io_engine": "Sync", "socket": None},
        {"drive_id": "data", "partuuid": None, "is_root_device": False, "cache_type": "Writeback",
         "is_read_only": True, "path_on_host": kernel, "rate_limiter": {"bandwidth": SHOWN_BUCKET, "ops": None},
         "io_engine": "Async", "socket": None},
        {"drive_id": "vub", "partuuid": None, "is_root_device": False, "cache_type": "Unsafe", "is_read_only": None,
         "path_on_host": None, "rate_limiter": None, "io_engine": None, "socket": "s"},
    ]  # fmt: skip
    assert list(api.config()["drives"][0])[-1] == "socket"


def test_there_is_one_root_device(api, kernel):
    def drive(name: str, root: bool) -> dict[str, Any]:
        return {"drive_id": name, "is_root_device": root, "path_on_host": kernel}

    def pmem(name: str, root: bool) -> dict[str, Any]:
        return {"id": name, "path_on_host": "x", "root_device": root}

    assert api.send("PUT", "/drives/a", drive("a", True))[0] == 204
    message = "Drive config error: A root block device already exists!"
    assert api.fault("PUT", "/drives/b", drive("b", True)) == message
    assert api.fault("PUT", "/pmem/p", pmem("p", True)) == (
        "Pmem config error: Attempt to add pmem as a root device while the root device defined as a block device"
    )
    assert api.send("PUT", "/drives/a", drive("a", True))[0] == 204  # the same one, once more
    assert api.send("PUT", "/drives/a", drive("a", False))[0] == 204
    assert api.send("PUT", "/pmem/p", pmem("p", True))[0] == 204
    assert api.send("PUT", "/pmem/p", pmem("p", True))[0] == 204
    assert api.fault("PUT", "/pmem/q", pmem("q", True)) == "Pmem config error: A root pmem device already exist"
    assert api.fault("PUT", "/drives/a", drive("a", True)) == message
    assert [drive["drive_id"] for drive in api.config()["drives"]] == ["a"]
    assert api.send("PUT", "/pmem/p", pmem("p", False))[0] == 204
    assert api.send("PUT", "/drives/b", drive("b", False))[0] == 204
    assert api.send("PUT", "/drives/b", drive("b", True))[0] == 204  # becomes the root device, and the first
    assert [drive["drive_id"] for drive in api.config()["drives"]] == ["b", "a"]


def test_a_drive_must_be_writable_unless_it_is_read_only(api, kernel, monkeypatch):
    opened: list[bool] = []

    def open_input(path: str, *, writable: bool) -> int:
        opened.append(writable)
        return os.open(path, os.O_RDONLY)

    monkeypatch.setattr("vmm.config.drives.open_input", open_input)
    for read_only in (None, False, True):
        body = {"drive_id": "a", "is_root_device": False, "path_on_host": kernel, "is_read_only": read_only}
        assert api.send("PUT", "/drives/a", body)[0] == 204
    assert opened == [True, True, False]


def test_network_interfaces_must_not_share_anything(api):
    first = {"iface_id": "a", "host_dev_name": "t0", "guest_mac": "AA:BB:CC:DD:EE:FF"}
    assert api.send("PUT", "/network-interfaces/a", first)[0] == 204
    same_mac = {"iface_id": "b", "host_dev_name": "t1", "guest_mac": "aa:bb:cc:dd:ee:ff"}
    message = "Network config error: The MAC address is already in use: aa:bb:cc:dd:ee:ff"
    assert api.fault("PUT", "/network-interfaces/b", same_mac) == message
    same_device = {"iface_id": "b", "host_dev_name": "t0"}
    assert api.fault("PUT", "/network-interfaces/b", same_device) == (
        f"{TAP}Error while creating ifreq structure: Resource busy (os error 16). Invalid TUN/TAP Backend provided by "
        "t0. Check our documentation on setting up the network devices."
    )
    assert api.send("PUT", "/network-interfaces/a", {**first, "mtu": 9000})[0] == 204
    assert api.config()["network-interfaces"] == [
        {"iface_id": "a", "host_dev_name": "t0", "guest_mac": "aa:bb:cc:dd:ee:ff", "mtu": 9000,
         "rx_rate_limiter": None, "tx_rate_limiter": None}
    ]  # fmt: skip


def test_an_interface_that_is_replaced_goes_to_the_end(api):
    for name in ("a", "b", "c", "a", "a"):
        body = {"iface_id": name, "host_dev_name": f"t{name}"}
        assert api.send("PUT", f"/network-interfaces/{name}", body)[0] == 204
    assert [interface["iface_id"] for interface in api.config()["network-interfaces"]] == ["c", "b", "a"]


def test_mmds_config_is_shown_with_its_interfaces_in_their_order(api):
    for name in ("a", "b", "c"):
        api.send("PUT", f"/network-interfaces/{name}", {"iface_id": name, "host_dev_name": f"t{name}"})
    assert api.config()["mmds-config"] is None
    config = {"network_interfaces": ["c", "a"], "version": "V2", "imds_compat": True}
    assert api.send("PUT", "/mmds/config", config)[0] == 204
    assert api.config()["mmds-config"] == {
        "version": "V2", "network_interfaces": ["a", "c"], "ipv4_address": "169.254.169.254", "imds_compat": True,
    }  # fmt: skip
    address = {"network_interfaces": ["b"], "version": "V2", "ipv4_address": "169.254.254.255"}
    assert api.send("PUT", "/mmds/config", address)[0] == 204
    assert api.config()["mmds-config"]["ipv4_address"] == "169.254.254.255"


def test_get_balloon(api):
    balloon = {"amount_mib": 1, "deflate_on_oom": True}
    assert api.send("PUT", "/balloon", balloon)[0] == 204
    status, shown = api.send("GET", "/balloon")
    assert status == 200
    assert list(shown.items()) == [
        ("amount_mib", 1), ("deflate_on_oom", True), ("stats_polling_interval_s", 0), ("free_page_hinting", False),
        ("free_page_reporting", False),
    ]  # fmt: skip
    assert api.config()["balloon"] == shown


def test_memory_may_not_become_smaller_than_the_balloon(api):
    assert api.send("PUT", "/balloon", {"amount_mib": 100, "deflate_on_oom": True})[0] == 204
    message = (
        "Machine config error: The memory size (MiB) is smaller than the previously set balloon device target size."
    )
    assert api.fault("PATCH", "/machine-config", {"mem_size_mib": 99}) == message
    assert api.send("PATCH", "/machine-config", {"mem_size_mib": 100})[0] == 204


def test_the_last_cpu_template_counts(api):
    assert api.send("PATCH", "/machine-config", {"cpu_template": "T2"})[0] == 204
    assert api.send("PUT", "/cpu-config", {"kvm_capabilities": ["1"]})[0] == 204
    assert "cpu_template" not in api.send("GET", "/machine-config")[1]
    assert api.session.resources.cpu_template is not None
    assert api.send("PATCH", "/machine-config", {"mem_size_mib": 64})[0] == 204
    assert api.session.resources.cpu_template is not None
    assert api.send("PATCH", "/machine-config", {"cpu_template": "T2A"})[0] == 204
    assert api.session.resources.cpu_template is None
    assert api.config()["cpu-config"] is None


# -- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/drives/data", {"drive_id": "data", "is_root_device": False, "socket": "s"}, "The block device data"),
        ("/pmem/p0", {"id": "p0", "path_on_host": "x"}, "The pmem device p0"),
        ("/network-interfaces/eth0", NET, "The network interface eth0"),
        ("/vsock", {"guest_cid": 3, "uds_path": "v"}, "The vsock device"),
        ("/balloon", {"amount_mib": 1, "deflate_on_oom": True}, "The balloon device"),
        ("/entropy", {}, "The entropy device"),
        ("/hotplug/memory", {"total_size_mib": 128}, "The memory hot-plug device"),
    ],
)
def test_devices_to_come_are_refused_by_name_at_the_start(api, kernel, path, body, name):
    api.send("PUT", "/boot-source", {"kernel_image_path": kernel})
    assert api.send("PUT", path, body) == (204, None)
    start = {"action_type": "InstanceStart"}
    assert api.fault("PUT", "/actions", start) == f"Start microvm error: {name} is not yet supported."
    assert not api.built


@pytest.mark.parametrize(
    ("path", "body", "allowed"),
    [
        ("/boot-source", {"kernel_image_path": "KERNEL"}, False),
        ("/drives/a", DRIVE, False),
        ("/pmem/a", PMEM, False),
        ("/network-interfaces/eth0", NET, False),
        ("/vsock", {"guest_cid": 3, "uds_path": "v"}, False),
        ("/entropy", {}, False),
        ("/balloon", {"amount_mib": 1, "deflate_on_oom": True}, False),
        ("/hotplug/memory", {"total_size_mib": 128}, False),
        ("/machine-config", {"vcpu_count": 1, "mem_size_mib": 128}, False),
        ("/logger", {"level": "Debug"}, True),
        ("/serial", {}, True),
        ("/mmds", {}, True),
        ("/cpu-config", {}, True),
        ("/drives/a", {**DRIVE, "path_on_host": "nix"}, True),  # refused: it has changed nothing
    ],
)
def test_a_snapshot_is_loaded_before_anything_boot_specific(api, kernel, path, body, allowed):
    api.send("PUT", path, json.dumps(body).replace("KERNEL", kernel).encode())
    refused = "Loading a microVM snapshot not allowed after configuring boot-specific resources."
    assert api.fault("PUT", "/snapshot/load", LOAD) == f"Load snapshot error: {NOT_YET if allowed else refused}"


# -- deprecation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "text"),
    [
        ("PATCH", "/machine-config", {"cpu_template": "None"},
         "PATCH /machine-config: cpu_template field is deprecated."),
        ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v", "vsock_id": "a"},
         "PUT /vsock: vsock_id field is deprecated."),
        ("PUT", "/mmds/config", {"network_interfaces": []}, "PUT /mmds/config: V1 is deprecated. Use V2 instead."),
        ("PUT", "/mmds/config", {"network_interfaces": [], "version": "V1"},
         "PUT /mmds/config: V1 is deprecated. Use V2 instead."),
        ("PUT", "/snapshot/load", {"snapshot_path": "s", "mem_file_path": "m"},
         "PUT /snapshot/load: mem_file_path field is deprecated."),
        ("PUT", "/snapshot/load", {**LOAD, "enable_diff_snapshots": True},
         "PUT /snapshot/load: enable_diff_snapshots field is deprecated."),
        ("PUT", "/snapshot/load", {"snapshot_path": "s", "mem_file_path": "m", "enable_diff_snapshots": True},
         "PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated."),
    ],
)  # fmt: skip
def test_deprecated_requests_are_marked_logged_and_counted(api, method, path, body, text):
    assert api.deprecated(method, path, body)  # also where the answer is an error
    assert f":WARN] {text}\n" in api.log()
    assert api.metrics["deprecated_api"].values == {"deprecated_http_api_calls": 1}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/vsock", {"guest_cid": 3, "uds_path": "v", "vsock_id": None}),
        ("/mmds/config", {"network_interfaces": [], "version": "V2"}),
        ("/snapshot/load", {**LOAD, "enable_diff_snapshots": False}),
    ],
)
def test_other_requests_are_not(api, path, body):
    assert not api.deprecated("PUT", path, body)
    assert api.metrics["deprecated_api"].values == {"deprecated_http_api_calls": 0}


def test_null_is_as_good_as_absent(api, kernel):
    for path, body in (
        ("/drives/a", {**DRIVE, "path_on_host": kernel, "partuuid": None, "rate_limiter": None, "socket": None}),
        ("/network-interfaces/eth0", {**NET, "guest_mac": None, "mtu": None, "rx_rate_limiter": {"ops": None}}),
        ("/entropy", {"rate_limiter": None}),
    ):
        assert api.send("PUT", path, body) == (204, None)
    assert api.config()["network-interfaces"][0]["rx_rate_limiter"] is None
