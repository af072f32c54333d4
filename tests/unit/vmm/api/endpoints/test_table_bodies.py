"""Bodies that are refused, with text and position, and values at their limits: what the table of the API leaves out."""

from __future__ import annotations

import pytest

POSTBOOT = "The requested operation is not supported after starting the microVM."
JSON = "An error occurred when deserializing the json body of a request: "
VCPUS = (
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if "
    "SMT is enabled."
)
MEMORY = "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size."
MACHINE_FIELDS = "one of `vcpu_count`, `mem_size_mib`, `smt`, `cpu_template`, `track_dirty_pages`, `huge_pages`"
FIELDS_2 = "`kernel_image_path`, `initrd_path`, `boot_args`"
NO_INITRD = (
    "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. "
    "No such file or directory (os error 2)"
)
NO_PCI = "PCI is not enabled"
MMDS = {"network_interfaces": ["eth0"], "version": "V2"}
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
    # the machine, the microVM, the log
    ("PUT", "/machine-config", "invalid_payload", JSON + "expected value at line 1 column 1."),
    ("PUT", "/machine-config", '{"mem_size_mib": 128}', JSON + "missing field `vcpu_count` at line 1 column 21."),
    ("PUT", "/machine-config", '{"vcpu_count": 2}', JSON + "missing field `mem_size_mib` at line 1 column 17."),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 1, "foo": 1}',
     JSON + f"unknown field `foo`, expected {MACHINE_FIELDS} at line 1 column 42."),
    ("PUT", "/machine-config", '{"vcpu_count": "-2"}',
     JSON + 'invalid type: string "-2", expected u8 at line 1 column 19.'),
    ("PUT", "/machine-config", '{"vcpu_count": 256}',
     JSON + "invalid value: integer `256`, expected u8 at line 1 column 18."),
    ("PUT", "/machine-config", '{"vcpu_count": 0, "mem_size_mib": 128}', VCPUS),
    ("PUT", "/machine-config", '{"vcpu_count": 33, "mem_size_mib": 128}', VCPUS),
    ("PUT", "/machine-config", '{"vcpu_count": 3, "mem_size_mib": 128, "smt": true}', VCPUS),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 0}', MEMORY),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": "2M"}', MEMORY),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": "Transparent"}', MEMORY),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 1, "huge_pages": "7M"}',
     JSON + "unknown variant `7M`, expected one of `None`, `Transparent`, `2M` at line 1 column 55."),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 1, "cpu_template": "X"}',
     JSON + "unknown variant `X`, expected one of `C3`, `T2`, `T2S`, `None`, `T2CL`, `T2A` at line 1 column 56."),
    ("PUT", "/machine-config", '{"vcpu_count": 1, "mem_size_mib": 18446744073709551616}',
     JSON + "invalid type: floating point `1.8446744073709552e+19`, expected usize at line 1 column 54."),
    ("PATCH", "/machine-config", "{}", "Empty PATCH request."),
    ("PATCH", "/machine-config", '{"smt": null}', "Empty PATCH request."),
    ("PATCH", "/machine-config", '{"smt": 1}',
     JSON + "invalid type: integer `1`, expected a boolean at line 1 column 9."),
    ("PATCH", "/machine-config", '{"mem_size_mib": 0}', MEMORY),
    ("PATCH", "/machine-config", '{"vcpu_count": 33}', VCPUS),
    ("PUT", "/boot-source", "{}", JSON + "missing field `kernel_image_path` at line 1 column 2."),
    ("PUT", "/boot-source", '{"kernel_image_path": 1}',
     JSON + "invalid type: integer `1`, expected a string at line 1 column 23."),
    ("PUT", "/boot-source", '{"kernel": "x"}',
     JSON + f"unknown field `kernel`, expected one of {FIELDS_2} at line 1 column 9."),
    ("PUT", "/boot-source", '{"kernel_image_path": "foo.bar"}',
     "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)"),
    ("PUT", "/boot-source", '{"kernel_image_path": ""}',
     "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)"),
    ("PUT", "/boot-source", '{"kernel_image_path": "/"}',
     "Boot source error: The kernel file cannot be opened: Is a directory (os error 21)"),
    ("PUT", "/boot-source", '{"kernel_image_path": "/dev/null"}',
     "Boot source error: The kernel file cannot be opened: not a regular file"),
    ("PUT", "/boot-source", '{"kernel_image_path": "a\\u0000b"}',
     "Boot source error: The kernel file cannot be opened: file name contained an unexpected NUL byte"),
    ("PUT", "/boot-source", '{"kernel_image_path": "KERNEL", "initrd_path": "foo"}',
     NO_INITRD),
    ("PUT", "/boot-source", '{"kernel_image_path": "KERNEL", "boot_args": "a\\u0000b"}',
     "Boot source error: The kernel command line is invalid: Null terminator detected in the command line structure."),
    ("PUT", "/boot-source", '{"kernel_image_path": "KERNEL", "boot_args": "%s"}' % ("x" * 2048),
     "Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided."),
    ("PUT", "/actions", "{}", JSON + "missing field `action_type` at line 1 column 2."),
    ("PUT", "/actions", '{"action_type": "Foo"}',
     JSON + "unknown variant `Foo`, expected one of `FlushMetrics`, `InstanceStart`, `SendCtrlAltDel` "
     "at line 1 column 21."),
    ("PUT", "/actions", '{"action_type": "InstanceStart", "payload": 1}',
     JSON + "unknown field `payload`, expected `action_type` at line 1 column 42."),
    ("PATCH", "/vm", '{"state": "Started"}',
     JSON + "unknown variant `Started`, expected `Paused` or `Resumed` at line 1 column 19."),
    ("PATCH", "/vm", "{}", JSON + "missing field `state` at line 1 column 2."),
    ("PUT", "/serial", '{"serial_out_path": 3}',
     JSON + "invalid type: integer `3`, expected path string at line 1 column 21."),
    ("PUT", "/serial", '{"out": 3}',
     JSON + "unknown field `out`, expected `serial_out_path` or `rate_limiter` at line 1 column 6."),
    ("PUT", "/serial", '{"rate_limiter": {"size": 1}}', JSON + "missing field `refill_time` at line 1 column 28."),
    ("PUT", "/serial", '{"rate_limiter": {"size": -1, "refill_time": 1}}',
     JSON + "invalid value: integer `-1`, expected u64 at line 1 column 28."),
    ("PUT", "/logger", '{"level": "loud"}', JSON + "Invalid LevelFilter at line 1 column 17."),
    ("PUT", "/logger", '{"path": "x"}',
     JSON + "unknown field `path`, expected one of `log_path`, `level`, `show_level`, `show_log_origin`, `module` "
     "at line 1 column 7."),
    ("PUT", "/logger", '{"log_path": "/nix/nix"}',
     "Logger error: Failed to open target file: No such file or directory (os error 2)"),
    ("PUT", "/logger", '{"log_path": "/"}', "Logger error: Failed to open target file: Is a directory (os error 21)"),
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
PARSED = ("An error occurred", "The I", "The id", "API Resource", "Empty", "Unrecog", "Invalid request", "Missing")


def name(case: tuple[str, str, str, str]) -> str:
    return f"{case[0]} {case[1]} {case[2][:60]!r}"


def body(case: tuple[str, str, str, str], kernel: str) -> bytes | None:
    """Return what is sent: nothing for an empty text."""
    return case[2].replace("KERNEL", kernel).encode() or None


@pytest.mark.parametrize("case", BAD_BODIES, ids=name)
def test_a_request_that_is_refused_changes_nothing(api, kernel, case):
    before = api.config(), api.session.resources.serial
    assert api.fault(case[0], case[1], body(case, kernel)) == case[3]
    assert (api.config(), api.session.resources.serial) == before
    assert not api.metrics.configured
    assert f"Status code: 400 Bad Request. Message: {case[3]}\n" in api.log()


@pytest.mark.parametrize("case", [case for case in BAD_BODIES if case[3].startswith(PARSED)], ids=name)
def test_the_body_is_looked_at_before_the_state(running, kernel, case):
    assert running.fault(case[0], case[1], body(case, kernel)) == case[3]


@pytest.mark.parametrize("case", [case for case in BAD_BODIES if not case[3].startswith(PARSED)], ids=name)
def test_the_state_is_looked_at_before_the_operation(running, kernel, case):
    assert running.fault(case[0], case[1], body(case, kernel)) in (POSTBOOT, NO_PCI)


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
