"""The API as a table: operation × (before the start, running, paused) × body → status and exact text.

Written from docs/formats/api.md, not from the code. In bodies, ``^`` is where serde reports an error in the body (and
is not part of the body); KERNEL and METRICS stand for paths of files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PREBOOT = "The requested operation is not supported before starting the microVM."
POSTBOOT = "The requested operation is not supported after starting the microVM."
NO_PCI = "PCI is not enabled"
NO_DEVICE = "Failed perform action on device: Device not found"
JSON = "An error occurred when deserializing the json body of a request: "
BAD_ID = "API Resource IDs can only contain alphanumeric characters and underscores."
IDS = "The id from the path does not match the id from the body!"
VALID, MISSING, UNKNOWN, TYPE, RANGE = "valid", "missing", "unknown", "wrong type", "out of range"
KINDS = (VALID, MISSING, UNKNOWN, TYPE, RANGE)

Expected = int | str


class Row(NamedTuple):
    """One request; the outcome in each state is a status of success or the fault message."""

    method: str
    path: str
    kind: str
    body: str | None
    before: Expected
    running: Expected
    paused: Expected

    @property
    def name(self) -> str:
        return f"{self.method} {self.path} {self.kind} {(self.body or '')[:60]}"


def always(method: str, path: str, kind: str, body: str | None, outcome: Expected) -> Row:
    """The same in every state."""
    return Row(method, path, kind, body, outcome, outcome, outcome)


def before(  # noqa: PLR0917
    method: str, path: str, kind: str, body: str | None, outcome: Expected, later: Expected = POSTBOOT
) -> Row:
    """Possible only before the start."""
    return Row(method, path, kind, body, outcome, later, later)


def after(method: str, path: str, kind: str, body: str | None, outcome: Expected) -> Row:
    """Possible only after the start."""
    return Row(method, path, kind, body, PREBOOT, outcome, outcome)


def bad(method: str, path: str, kind: str, body: str, text: str) -> Row:
    """A body that cannot be decoded: looked at before the state is. ``^`` marks where the error is reported."""
    column = body.index("^")
    return always(method, path, kind, body.replace("^", ""), f"{JSON}{text} at line 1 column {column}.")


def get(path: str, earlier: Expected = 200, later: Expected = 200) -> list[Row]:
    """A GET: as it is, and with a body, which is refused."""
    return [
        Row("GET", path, VALID, None, earlier, later, later),
        always("GET", path, UNKNOWN, "{}", "GET request cannot have a body."),
    ]


def empty(method: str, path: str) -> Row:
    """No body where one is needed."""
    return always(method, path, MISSING, None, f"Empty {method} request.")


def one_of(*names: str) -> str:
    """What serde expects."""
    quoted = [f"`{name}`" for name in names]
    if len(quoted) < 3:
        return "expected " + " or ".join(quoted)
    return f"expected one of {', '.join(quoted)}"


# ---------------------------------------------------------------- the machine

MACHINE = ("vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages")
VCPUS = (
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if "
    "SMT is enabled."
)
MEMORY = "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size."
NO_KERNEL = "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)"
CMDLINE = "Boot source error: The kernel command line is invalid: "

_MACHINE: list[Row] = [
    *get("/"),
    *get("/version"),
    *get("/vm/config"),
    *get("/machine-config"),
    empty("PUT", "/machine-config"),
    before("PUT", "/machine-config", VALID, '{"vcpu_count": 2, "mem_size_mib": 128, "smt": true}', 204),
    before("PUT", "/machine-config", VALID, "[2, 128, true]", 204),
    bad("PUT", "/machine-config", MISSING, "{}^", "missing field `vcpu_count`"),
    bad("PUT", "/machine-config", MISSING, "[1]^", "invalid length 1, expected struct MachineConfig with 6 elements"),
    bad("PUT", "/machine-config", MISSING, '{"vcpu_count": 1}^', "missing field `mem_size_mib`"),
    bad("PUT", "/machine-config", UNKNOWN, '{"foo"^: 1}', f"unknown field `foo`, {one_of(*MACHINE)}"),
    bad("PUT", "/machine-config", TYPE, '{"vcpu_count": "1"^}', 'invalid type: string "1", expected u8'),
    bad("PUT", "/machine-config", TYPE, '{"smt": null^}', "invalid type: null, expected a boolean"),
    bad("PUT", "/machine-config", TYPE, '{"mem_size_mib": 1.5^}', "invalid type: floating point `1.5`, expected usize"),
    before("PUT", "/machine-config", RANGE, '{"vcpu_count": 3, "mem_size_mib": 128, "smt": true}', VCPUS),
    before("PUT", "/machine-config", RANGE, '{"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": "2M"}', MEMORY),
    bad("PUT", "/machine-config", RANGE, '{"huge_pages": "1G"^}',
        f"unknown variant `1G`, {one_of('None', 'Transparent', '2M')}"),
    bad("PUT", "/machine-config", RANGE, '{"cpu_template": "T3"^}',
        f"unknown variant `T3`, {one_of('C3', 'T2', 'T2S', 'None', 'T2CL', 'T2A')}"),
    empty("PATCH", "/machine-config"),
    before("PATCH", "/machine-config", VALID, '{"vcpu_count": 1, "smt": false}', 204),
    always("PATCH", "/machine-config", MISSING, "{}", "Empty PATCH request."),
    always("PATCH", "/machine-config", MISSING, '{"smt": null}', "Empty PATCH request."),
    always("PATCH", "/machine-config", MISSING, "[]", "Empty PATCH request."),
    bad("PATCH", "/machine-config", UNKNOWN, '{"ht_enabled"^: true}',
        f"unknown field `ht_enabled`, {one_of(*MACHINE)}"),
    bad("PATCH", "/machine-config", TYPE, '{"track_dirty_pages": "no"^}',
        'invalid type: string "no", expected a boolean'),
    before("PATCH", "/machine-config", RANGE, '{"vcpu_count": 33}', VCPUS),
    empty("PUT", "/boot-source"),
    before("PUT", "/boot-source", VALID, '{"kernel_image_path": "KERNEL", "boot_args": null}', 204),
    before("PUT", "/boot-source", VALID, '["KERNEL", null, "quiet"]', 204),
    bad("PUT", "/boot-source", MISSING, "{}^", "missing field `kernel_image_path`"),
    bad("PUT", "/boot-source", MISSING, '["k"]^', "invalid length 1, expected struct BootSourceConfig with 3 elements"),
    bad("PUT", "/boot-source", UNKNOWN, '{"kernel"^: 1}',
        f"unknown field `kernel`, {one_of('kernel_image_path', 'initrd_path', 'boot_args')}"),
    bad("PUT", "/boot-source", TYPE, '{"kernel_image_path": ^[]}', "invalid type: sequence, expected a string"),
    before("PUT", "/boot-source", RANGE, '{"kernel_image_path": "/nix"}', NO_KERNEL),
    before("PUT", "/boot-source", VALID,
           '{"kernel_image_path": "KERNEL", "boot_args": "quiet\\tmotd=grüß \\u0001\\r\\n"}', 204),
    before("PUT", "/boot-source", RANGE, '{"kernel_image_path": "KERNEL", "boot_args": "a\\u0000"}',
           f"{CMDLINE}Null terminator detected in the command line structure."),
    before("PUT", "/boot-source", RANGE, '{"kernel_image_path": "KERNEL", "boot_args": "%s"}' % ("a" * 2048),
           f"{CMDLINE}Invalid cmdline capacity provided."),
    empty("PUT", "/cpu-config"),
    before("PUT", "/cpu-config", VALID, '{"kvm_capabilities": ["!56"], "cpuid_modifiers": []}', 204),
    before("PUT", "/cpu-config", VALID, "{}", 204),
    bad("PUT", "/cpu-config", MISSING, '{"msr_modifiers": [{"addr": "0x1"}^]}', "missing field `bitmap`"),
    bad("PUT", "/cpu-config", UNKNOWN, '{"cpuid"^: []}',
        f"unknown field `cpuid`, {one_of('kvm_capabilities', 'cpuid_modifiers', 'msr_modifiers')}"),
    bad("PUT", "/cpu-config", TYPE, '{"msr_modifiers": ^{}}', "invalid type: map, expected a sequence"),
    empty("PUT", "/serial"),
    before("PUT", "/serial", VALID, '{"serial_out_path": null, "rate_limiter": null}', 204),
    bad("PUT", "/serial", MISSING, '{"rate_limiter": {"size": 1}^}', "missing field `refill_time`"),
    bad("PUT", "/serial", UNKNOWN, '{"path"^: 1}',
        f"unknown field `path`, {one_of('serial_out_path', 'rate_limiter')}"),
    bad("PUT", "/serial", TYPE, '{"serial_out_path": 1^}', "invalid type: integer `1`, expected path string"),
    empty("PUT", "/logger"),
    before("PUT", "/logger", VALID, '{"level": "Debug", "show_level": true, "show_log_origin": null}', 204),
    before("PUT", "/logger", VALID, '{"level": "iNFO"}', 204),
    bad("PUT", "/logger", UNKNOWN, '{"path"^: 1}',
        f"unknown field `path`, {one_of('log_path', 'level', 'show_level', 'show_log_origin', 'module')}"),
    bad("PUT", "/logger", TYPE, '{"show_level": 1^}', "invalid type: integer `1`, expected a boolean"),
    bad("PUT", "/logger", RANGE, '{"level": "loud"}^', "Invalid LevelFilter"),
    before("PUT", "/logger", RANGE, '{"log_path": "/nix/log"}',
           "Logger error: Failed to open target file: No such file or directory (os error 2)"),
    empty("PUT", "/metrics"),
    before("PUT", "/metrics", RANGE, '{"metrics_path": "/nix/m"}',
           "Metrics error: Cannot initialize the metrics system due to bad user input: No such file or directory "
           "(os error 2)"),
    before("PUT", "/metrics", VALID,
        '{"metrics_path": "METRICS", "emit_id": true, "properties": {"a": "b"}, "x": 1}', 204),
    before("PUT", "/metrics", RANGE, '{"metrics_path": "METRICS"}',
           "Metrics error: Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not "
           "allowed."),
    bad("PUT", "/metrics", MISSING, "{}^", "missing field `metrics_path`"),
    bad("PUT", "/metrics", TYPE, '{"metrics_path": null^}', "invalid type: null, expected path string"),
    bad("PUT", "/metrics", TYPE, '{"properties": {"a": 1^}}', "invalid type: integer `1`, expected a string"),
]  # fmt: skip

# ---------------------------------------------------------------- devices

DRIVE = (
    "drive_id", "partuuid", "is_root_device", "cache_type", "is_read_only", "path_on_host", "rate_limiter", "io_engine",
    "socket",
)  # fmt: skip
NET = ("iface_id", "host_dev_name", "guest_mac", "mtu", "rx_rate_limiter", "tx_rate_limiter")
BALLOON = (
    "amount_mib", "deflate_on_oom", "stats_polling_interval_s", "free_page_hinting", "free_page_reporting",
)  # fmt: skip
PATCHED_DRIVE = (
    f"Drive config error: Unable to patch the block device: {NO_DEVICE} Please verify the request arguments."
)
PATCHED_PMEM = f"Pmem config error: Unable to patch the pmem device: {NO_DEVICE} Please verify the request arguments."
PATCHED_NET = f"Network config error: Unable to update the net device: {NO_DEVICE}"
BLOCK = "Drive config error: Unable to create the virtio block device: "

_DEVICES: list[Row] = [
    empty("PUT", "/drives/a"),
    before("PUT", "/drives/a", VALID, '{"drive_id": "a", "is_root_device": false, "path_on_host": "KERNEL"}',
           204, NO_PCI),
    bad("PUT", "/drives/a", MISSING, "{}^", "missing field `drive_id`"),
    before("PUT", "/drives/a", MISSING, '{"drive_id": "a", "is_root_device": false}', f"{BLOCK}Invalid block config.",
           NO_PCI),
    bad("PUT", "/drives/a", UNKNOWN, '{"id"^: "a"}', f"unknown field `id`, {one_of(*DRIVE)}"),
    bad("PUT", "/drives/a", TYPE, '{"is_root_device": 0^}', "invalid type: integer `0`, expected a boolean"),
    bad("PUT", "/drives/a", RANGE, '{"cache_type": "Full"^}',
        f"unknown variant `Full`, {one_of('Unsafe', 'Writeback')}"),
    bad("PUT", "/drives/a", RANGE, '{"io_engine": "Io"^}', f"unknown variant `Io`, {one_of('Async', 'Sync')}"),
    always("PUT", "/drives/a", RANGE, '{"drive_id": "b", "is_root_device": false}', IDS),
    always("PUT", "/drives/a-b", RANGE, '{"drive_id": "a-b", "is_root_device": false}', BAD_ID),
    always("PUT", "/drives", RANGE, '{"drive_id": "", "is_root_device": false}', "The ID cannot be empty."),
    empty("PATCH", "/drives/a"),
    after("PATCH", "/drives/a", VALID, '{"drive_id": "a", "path_on_host": "KERNEL"}', PATCHED_DRIVE),
    after("PATCH", "/drives/a", VALID, '{"drive_id": "a"}', PATCHED_DRIVE),
    bad("PATCH", "/drives/a", MISSING, "{}^", "missing field `drive_id`"),
    bad("PATCH", "/drives/a", UNKNOWN, '{"is_read_only"^: true}',
        f"unknown field `is_read_only`, {one_of('drive_id', 'path_on_host', 'rate_limiter')}"),
    bad("PATCH", "/drives/a", TYPE, '{"path_on_host": ^{}}', "invalid type: map, expected a string"),
    always("PATCH", "/drives/a", RANGE, '{"drive_id": "b"}', IDS),
    after("DELETE", "/drives/a", VALID, None, NO_PCI),
    always("DELETE", "/drives/a", UNKNOWN, "{}", "Empty Delete request."),
    empty("PUT", "/pmem/a"),
    before("PUT", "/pmem/a", VALID, '{"id": "a", "path_on_host": "KERNEL", "read_only": true}', 204, NO_PCI),
    bad("PUT", "/pmem/a", MISSING, '{"id": "a"}^', "missing field `path_on_host`"),
    bad("PUT", "/pmem/a", UNKNOWN, '{"size"^: 1}',
        f"unknown field `size`, {one_of('id', 'path_on_host', 'root_device', 'read_only', 'rate_limiter')}"),
    bad("PUT", "/pmem/a", TYPE, '{"root_device": "y"^}', 'invalid type: string "y", expected a boolean'),
    always("PUT", "/pmem/a", RANGE, '{"id": "b", "path_on_host": "x"}', IDS),
    empty("PATCH", "/pmem/a"),
    after("PATCH", "/pmem/a", VALID, '{"id": "a", "rate_limiter": {}}', PATCHED_PMEM),
    bad("PATCH", "/pmem/a", MISSING, "{}^", "missing field `id`"),
    bad("PATCH", "/pmem/a", UNKNOWN, '{"read_only"^: true}',
        f"unknown field `read_only`, {one_of('id', 'rate_limiter')}"),
    bad("PATCH", "/pmem/a", TYPE, '{"rate_limiter": 5^}',
        "invalid type: integer `5`, expected struct RateLimiterConfig"),
    always("PATCH", "/pmem/a", RANGE, '{"id": "b"}', IDS),
    after("DELETE", "/pmem/a", VALID, None, NO_PCI),
    always("DELETE", "/pmem/a", UNKNOWN, "{}", "Empty Delete request."),
    empty("PUT", "/network-interfaces/e0"),
    before("PUT", "/network-interfaces/e0", VALID, '{"iface_id": "e0", "host_dev_name": "tap0"}', 204, NO_PCI),
    bad("PUT", "/network-interfaces/e0", MISSING, '{"iface_id": "e0"}^', "missing field `host_dev_name`"),
    bad("PUT", "/network-interfaces/e0", UNKNOWN, '{"mac"^: 1}', f"unknown field `mac`, {one_of(*NET)}"),
    bad("PUT", "/network-interfaces/e0", TYPE, '{"mtu": true^}', "invalid type: boolean `true`, expected u16"),
    bad("PUT", "/network-interfaces/e0", RANGE, '{"guest_mac": "06:00"}^', "The provided MAC address is invalid."),
    before("PUT", "/network-interfaces/e0", RANGE, '{"iface_id": "e0", "host_dev_name": "a234567890123456"}',
           "Network config error: Could not create the network device: Open tap device failed: Invalid interface name",
           NO_PCI),
    always("PUT", "/network-interfaces/e0", RANGE, '{"iface_id": "e1", "host_dev_name": "t"}',
           "The id from the path [e0] does not match the id from the body [e1]!"),
    empty("PATCH", "/network-interfaces/e0"),
    after("PATCH", "/network-interfaces/e0", VALID, '{"iface_id": "e0", "rx_rate_limiter": null}', PATCHED_NET),
    bad("PATCH", "/network-interfaces/e0", MISSING, "{}^", "missing field `iface_id`"),
    bad("PATCH", "/network-interfaces/e0", UNKNOWN, '{"mtu"^: 1}',
        f"unknown field `mtu`, {one_of('iface_id', 'rx_rate_limiter', 'tx_rate_limiter')}"),
    bad("PATCH", "/network-interfaces/e0", TYPE, '{"rx_rate_limiter": {"ops": 1^}}',
        "invalid type: integer `1`, expected struct TokenBucketConfig"),
    after("DELETE", "/network-interfaces/e0", VALID, None, NO_PCI),
    always("DELETE", "/network-interfaces/e0", UNKNOWN, "{}", "Empty Delete request."),
    empty("PUT", "/vsock"),
    before("PUT", "/vsock", VALID, '{"guest_cid": 3, "uds_path": "v.sock"}', 204),
    bad("PUT", "/vsock", MISSING, '{"guest_cid": 3}^', "missing field `uds_path`"),
    bad("PUT", "/vsock", UNKNOWN, '{"cid"^: 3}', f"unknown field `cid`, {one_of('vsock_id', 'guest_cid', 'uds_path')}"),
    bad("PUT", "/vsock", TYPE, '{"guest_cid": "3"^}', 'invalid type: string "3", expected u32'),
    empty("PUT", "/entropy"),
    before("PUT", "/entropy", VALID, '{"rate_limiter": {"bandwidth": null}}', 204),
    bad("PUT", "/entropy", MISSING, '{"rate_limiter": {"bandwidth": {}^}}', "missing field `size`"),
    bad("PUT", "/entropy", UNKNOWN, '{"source"^: 1}', "unknown field `source`, expected `rate_limiter`"),
    bad("PUT", "/entropy", TYPE, '{"rate_limiter": "x"^}',
        'invalid type: string "x", expected struct RateLimiterConfig'),
    Row("GET", "/balloon", VALID, None, "Balloon config error: No balloon device found.",
        *[f"Internal VMM error: {NO_DEVICE}"] * 2),
    always("GET", "/balloon", UNKNOWN, "{}", "GET request cannot have a body."),
    empty("PUT", "/balloon"),
    before("PUT", "/balloon", VALID, '{"amount_mib": 64, "deflate_on_oom": true}', 204),
    bad("PUT", "/balloon", MISSING, '{"amount_mib": 1}^', "missing field `deflate_on_oom`"),
    bad("PUT", "/balloon", UNKNOWN, '{"size"^: 1}', f"unknown field `size`, {one_of(*BALLOON)}"),
    bad("PUT", "/balloon", TYPE, '{"deflate_on_oom": "y"^}', 'invalid type: string "y", expected a boolean'),
    before("PUT", "/balloon", RANGE, '{"amount_mib": 129, "deflate_on_oom": true}',
           "Balloon config error: Amount of pages requested is too large."),
    empty("PATCH", "/balloon"),
    after("PATCH", "/balloon", VALID, '{"amount_mib": 1}', f"Balloon update error: {NO_DEVICE}"),
    bad("PATCH", "/balloon", MISSING, "{}^", "missing field `amount_mib`"),
    bad("PATCH", "/balloon", UNKNOWN, '{"deflate_on_oom"^: 1}',
        "unknown field `deflate_on_oom`, expected `amount_mib`"),
    bad("PATCH", "/balloon", TYPE, '{"amount_mib": null^}', "invalid type: null, expected u32"),
    *get("/balloon/statistics", PREBOOT, f"Internal VMM error: {NO_DEVICE}"),
    empty("PATCH", "/balloon/statistics"),
    after("PATCH", "/balloon/statistics", VALID, '{"stats_polling_interval_s": 1}',
          f"Balloon update error: {NO_DEVICE}"),
    bad("PATCH", "/balloon/statistics", MISSING, "{}^", "missing field `stats_polling_interval_s`"),
    bad("PATCH", "/balloon/statistics", UNKNOWN, '{"s"^: 1}', "unknown field `s`, expected `stats_polling_interval_s`"),
    bad("PATCH", "/balloon/statistics", TYPE, '{"stats_polling_interval_s": ^[]}',
        "invalid type: sequence, expected u16"),
    after("PATCH", "/balloon/hinting/start", VALID, None, f"Balloon update error: {NO_DEVICE}"),
    after("PATCH", "/balloon/hinting/start", UNKNOWN, '{"more": 1}', f"Balloon update error: {NO_DEVICE}"),
    bad("PATCH", "/balloon/hinting/start", TYPE, '{"acknowledge_on_stop": 1^}',
        "invalid type: integer `1`, expected a boolean"),
    *get("/balloon/hinting/status", PREBOOT, f"Balloon update error: {NO_DEVICE}"),
    after("PATCH", "/balloon/hinting/stop", VALID, None, f"Balloon update error: {NO_DEVICE}"),
    after("PATCH", "/balloon/hinting/stop", UNKNOWN, "{}", f"Balloon update error: {NO_DEVICE}"),
    always("GET", "/balloon/nothing", UNKNOWN, None, "Unrecognized GET request path `nothing`."),
    empty("PUT", "/hotplug/memory"),
    before("PUT", "/hotplug/memory", VALID, '{"total_size_mib": 256}', 204),
    bad("PUT", "/hotplug/memory", MISSING, "{}^", "missing field `total_size_mib`"),
    bad("PUT", "/hotplug/memory", UNKNOWN, '{"size"^: 1}',
        f"unknown field `size`, {one_of('total_size_mib', 'block_size_mib', 'slot_size_mib')}"),
    bad("PUT", "/hotplug/memory", TYPE, '{"total_size_mib": "1"^}', 'invalid type: string "1", expected u32'),
    before("PUT", "/hotplug/memory", RANGE, '{"total_size_mib": 256, "block_size_mib": 3}',
           "Memory hotplug config error: Block size must be a power of 2"),
    before("PUT", "/hotplug/memory", RANGE, '{"total_size_mib": 256, "slot_size_mib": 129}',
           "Memory hotplug config error: Slot size must be a multiple of block size (2 MiB)"),
    before("PUT", "/hotplug/memory", RANGE, '{"total_size_mib": 129}',
           "Memory hotplug config error: Total size must be a multiple of slot size (128 MiB)"),
    *get("/hotplug/memory", PREBOOT, f"Internal VMM error: {NO_DEVICE}"),
    empty("PATCH", "/hotplug/memory"),
    after("PATCH", "/hotplug/memory", VALID, '{"requested_size_mib": 2}', f"Memory hotplug update error: {NO_DEVICE}"),
    bad("PATCH", "/hotplug/memory", MISSING, "{}^", "missing field `requested_size_mib`"),
    bad("PATCH", "/hotplug/memory", UNKNOWN, '{"size"^: 1}', "unknown field `size`, expected `requested_size_mib`"),
    bad("PATCH", "/hotplug/memory", TYPE, '{"requested_size_mib": false^}',
        "invalid type: boolean `false`, expected u32"),
]  # fmt: skip

# ---------------------------------------------------------------- metadata, snapshots, operation

LOAD = (
    "snapshot_path", "mem_file_path", "mem_backend", "enable_diff_snapshots", "track_dirty_pages", "resume_vm",
    "network_overrides", "vsock_override", "clock_realtime", "huge_pages",
)  # fmt: skip
MMMDS = "MMMDS config error: "
NO_MMDS = "MMDS error: The MMDS data store is not initialized."
NOT_AFTER = "Loading a microVM snapshot not allowed after configuring boot-specific resources."
RUNNING = "Create snapshot error: Operation not allowed: save/restore unavailable while running"

_OPERATION: list[Row] = [
    *get("/mmds"),
    always("PATCH", "/mmds", VALID, "{}", NO_MMDS),  # before any PUT; after the start no interface leads to the store
    empty("PUT", "/mmds"),
    before("PUT", "/mmds", VALID, '{"a": {"b": 1}}', 204, NO_MMDS),
    bad("PUT", "/mmds", MISSING, '{"a"}^', "expected `:`"),
    bad("PUT", "/mmds", TYPE, "nul^", "EOF while parsing a value"),
    always("PUT", "/mmds/x", UNKNOWN, "{}", "Unrecognized PUT request path `x`."),
    empty("PATCH", "/mmds"),
    before("PATCH", "/mmds", VALID, '{"a": {"b": null}, "c": []}', 204, NO_MMDS),
    bad("PATCH", "/mmds", TYPE, "{]^", "key must be a string"),
    empty("PUT", "/mmds/config"),
    before("PUT", "/mmds/config", VALID, '{"network_interfaces": ["e0"], "version": "V2", "ipv4_address": null}', 204),
    bad("PUT", "/mmds/config", MISSING, "{}^", "missing field `network_interfaces`"),
    bad("PUT", "/mmds/config", UNKNOWN, '{"x"^: 1}',
        f"unknown field `x`, {one_of('version', 'network_interfaces', 'ipv4_address', 'imds_compat')}"),
    bad("PUT", "/mmds/config", TYPE, '{"network_interfaces": "e0"^}', 'invalid type: string "e0", expected a sequence'),
    bad("PUT", "/mmds/config", RANGE, '{"version": "V3"^}', f"unknown variant `V3`, {one_of('V1', 'V2')}"),
    bad("PUT", "/mmds/config", RANGE, '{"ipv4_address": "1.2.3"}^', "invalid IPv4 address syntax"),
    before("PUT", "/mmds/config", RANGE, '{"network_interfaces": ["e0"], "ipv4_address": "10.0.0.1"}',
           f"{MMMDS}The MMDS IPv4 address is not link local."),
    before("PUT", "/mmds/config", RANGE, '{"network_interfaces": []}',
           f"{MMMDS}The list of network interface IDs that allow forwarding MMDS requests is empty."),
    before("PUT", "/mmds/config", RANGE, '{"network_interfaces": ["nix"]}',
           f"{MMMDS}The list of network interface IDs provided contains at least one ID that does not correspond to "
           "any existing network interface."),
    empty("PUT", "/snapshot/create"),
    Row("PUT", "/snapshot/create", VALID, '{"snapshot_path": "s", "mem_file_path": "m"}', PREBOOT, RUNNING,
        "Create snapshot error: Snapshots are not yet supported."),
    bad("PUT", "/snapshot/create", MISSING, '{"snapshot_path": "s"}^', "missing field `mem_file_path`"),
    bad("PUT", "/snapshot/create", UNKNOWN, '{"version"^: 1}',
        f"unknown field `version`, {one_of('snapshot_type', 'snapshot_path', 'mem_file_path')}"),
    bad("PUT", "/snapshot/create", TYPE, '{"mem_file_path": 1^}', "invalid type: integer `1`, expected path string"),
    bad("PUT", "/snapshot/create", RANGE, '{"snapshot_type": "Half"^}',
        f"unknown variant `Half`, {one_of('Diff', 'Full')}"),
    empty("PUT", "/snapshot/load"),
    before("PUT", "/snapshot/load", VALID, '{"snapshot_path": "s", "mem_file_path": "m"}',
           f"Load snapshot error: {NOT_AFTER}"),
    always("PUT", "/snapshot/load", MISSING, '{"snapshot_path": "s"}',
           f"{JSON}missing field: either `mem_backend` or `mem_file_path` is required."),
    bad("PUT", "/snapshot/load", UNKNOWN, '{"x"^: 1}', f"unknown field `x`, {one_of(*LOAD)}"),
    bad("PUT", "/snapshot/load", TYPE, '{"resume_vm": "y"^}', 'invalid type: string "y", expected a boolean'),
    bad("PUT", "/snapshot/load", RANGE, '{"mem_backend": {"backend_type": "Ram"^}}',
        f"unknown variant `Ram`, {one_of('File', 'Uffd')}"),
    empty("PATCH", "/vm"),
    bad("PATCH", "/vm", MISSING, "{}^", "missing field `state`"),
    bad("PATCH", "/vm", UNKNOWN, '{"x"^: 1}', "unknown field `x`, expected `state`"),
    bad("PATCH", "/vm", TYPE, '{"state": 1^}', "expected value"),
    bad("PATCH", "/vm", RANGE, '{"state": "Halted"^}', f"unknown variant `Halted`, {one_of('Paused', 'Resumed')}"),
    empty("PUT", "/actions"),
    after("PUT", "/actions", VALID, '{"action_type": "FlushMetrics"}', 204),
    after("PUT", "/actions", VALID, '{"action_type": "SendCtrlAltDel"}', 204),
    bad("PUT", "/actions", MISSING, "{}^", "missing field `action_type`"),
    bad("PUT", "/actions", UNKNOWN, '{"payload"^: 1}', "unknown field `payload`, expected `action_type`"),
    bad("PUT", "/actions", TYPE, '{"action_type": t^rue}', "expected value"),
    bad("PUT", "/actions", RANGE, '{"action_type": "Stop"^}',
        f"unknown variant `Stop`, {one_of('FlushMetrics', 'InstanceStart', 'SendCtrlAltDel')}"),
    # Last: with devices that do not exist yet, a start names the first of them.
    before("PUT", "/actions", VALID, '{"action_type": "InstanceStart"}',
           "Start microvm error: The pmem device a is not yet supported."),
]  # fmt: skip

TABLE = [*_MACHINE, *_DEVICES, *_OPERATION]
#: These keep the state: sent in it, they are a part of the table, too.
STATE_CHANGES = [
    Row("PATCH", "/vm", VALID, '{"state": "Resumed"}', PREBOOT, 204, -1),
    Row("PATCH", "/vm", VALID, '{"state": "Paused"}', PREBOOT, -1, 204),
]


# ---------------------------------------------------------------- numbers


class Number(NamedTuple):
    """A numeric field: the request with VALUE in its place, both edges, and what is said one beyond each."""

    method: str
    path: str
    body: str
    low: int
    high: int
    below: str
    above: str
    before: Expected = 204
    later: Expected = POSTBOOT


def _type_error(rust: str, value: int, body: str) -> str:
    column = body.index("VALUE") + len(str(value))
    return f"{JSON}invalid value: integer `{value}`, expected {rust} at line 1 column {column}."


def _float_error(rust: str, body: str) -> str:
    column = body.index("VALUE") + len(str(1 << 64))
    return f"{JSON}invalid type: floating point `1.8446744073709552e+19`, expected {rust} at line 1 column {column}."


def _u(  # noqa: PLR0917
    bits: int, method: str, path: str, body: str, before_: Expected = 204, later: Expected = POSTBOOT
) -> Number:
    """A field whose only limits are those of its type."""
    rust = f"u{bits}"
    high = (1 << bits) - 1
    above = _float_error(rust, body) if bits == 64 else _type_error(rust, high + 1, body)
    return Number(method, path, body, 0, high, _type_error(rust, -1, body), above, before_, later)


def _buckets(method: str, path: str, around: str, before_: Expected, later: Expected) -> list[Number]:
    """The three numbers of a token bucket; ``around`` has BUCKET in it."""
    texts = (
        '{"size": VALUE, "refill_time": 1}',
        '{"size": 1, "refill_time": VALUE}',
        '{"size": 1, "refill_time": 1, "one_time_burst": VALUE}',
    )
    return [_u(64, method, path, around.replace("BUCKET", text), before_, later) for text in texts]


def _limiters(method: str, path: str, around: str, before_: Expected, later: Expected) -> list[Number]:
    return [
        number
        for name in ("bandwidth", "ops")
        for number in _buckets(method, path, around.replace("LIMITER", f'{{"{name}": BUCKET}}'), before_, later)
    ]


_VCPU_BODY = '{"vcpu_count": VALUE, "mem_size_mib": 128}'
_MEM_BODY = '{"vcpu_count": 1, "mem_size_mib": VALUE}'
_MTU_BODY = '{"iface_id": "e0", "host_dev_name": "tap0", "mtu": VALUE}'
_CID_BODY = '{"guest_cid": VALUE, "uds_path": "v"}'
_AMOUNT_BODY = '{"amount_mib": VALUE, "deflate_on_oom": false}'
_POLL_BODY = '{"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": VALUE}'
_TOTAL_BODY = '{"total_size_mib": VALUE}'
_BLOCK_BODY = '{"total_size_mib": 2147483648, "slot_size_mib": 2147483648, "block_size_mib": VALUE}'
_SLOT_BODY = '{"total_size_mib": 4294967168, "slot_size_mib": VALUE}'
_FLAGS_BODY = '{"cpuid_modifiers": [{"leaf": "0x0", "subleaf": "0x0", "flags": VALUE, "modifiers": []}]}'
_NET_ID = '"iface_id": "e0"'
_QUEUES_BODY = '{"drive_id": "a", "is_root_device": false, "path_on_host": "KERNEL", "num_queues": VALUE}'
_HOTPLUG = "Memory hotplug config error: "
NUMBERS: list[Number] = [
    # First: the memory is what the table has left, and the balloon is to be small for what follows.
    Number("PUT", "/balloon", _AMOUNT_BODY, 0, 128, _type_error("u32", -1, _AMOUNT_BODY),
           "Balloon config error: Amount of pages requested is too large."),
    _u(16, "PUT", "/balloon", _POLL_BODY),
    Number("PUT", "/machine-config", _VCPU_BODY, 1, 32, VCPUS, VCPUS),
    Number("PATCH", "/machine-config", '{"vcpu_count": VALUE}', 1, 32, VCPUS, VCPUS),
    Number("PUT", "/machine-config", _MEM_BODY, 1, (1 << 64) - 1, MEMORY, _float_error("usize", _MEM_BODY)),
    Number("PATCH", "/machine-config", '{"mem_size_mib": VALUE}', 1, (1 << 64) - 1, MEMORY,
           _float_error("usize", '{"mem_size_mib": VALUE}')),
    *_buckets("PUT", "/serial", '{"rate_limiter": BUCKET}', 204, POSTBOOT),
    Number("PUT", "/drives/a", _QUEUES_BODY, 1, 16, f"{BLOCK}num_queues is 0, and can be 1 to 16.",
           f"{BLOCK}num_queues is 17, and can be 1 to 16.", later=NO_PCI),
    *_limiters("PUT", "/drives/a",
               '{"drive_id": "a", "is_root_device": false, "path_on_host": "/dev/zero", "rate_limiter": LIMITER}',
               f"{BLOCK}Virtio backend error: Error manipulating the backing file: not a regular file /dev/zero",
               NO_PCI),
    *_limiters("PATCH", "/drives/a", '{"drive_id": "a", "rate_limiter": LIMITER}', PREBOOT, PATCHED_DRIVE),
    *_limiters("PUT", "/pmem/a", '{"id": "a", "path_on_host": "x", "rate_limiter": LIMITER}', 204, NO_PCI),
    *_limiters("PATCH", "/pmem/a", '{"id": "a", "rate_limiter": LIMITER}', PREBOOT, PATCHED_PMEM),
    *_limiters("PUT", "/network-interfaces/e0", f'{{{_NET_ID}, "host_dev_name": "t", "rx_rate_limiter": LIMITER}}',
               204, NO_PCI),
    *_limiters("PUT", "/network-interfaces/e0", f'{{{_NET_ID}, "host_dev_name": "t", "tx_rate_limiter": LIMITER}}',
               204, NO_PCI),
    *_limiters("PATCH", "/network-interfaces/e0", f'{{{_NET_ID}, "rx_rate_limiter": LIMITER}}', PREBOOT, PATCHED_NET),
    *_limiters("PATCH", "/network-interfaces/e0", f'{{{_NET_ID}, "tx_rate_limiter": LIMITER}}', PREBOOT, PATCHED_NET),
    *_limiters("PUT", "/entropy", '{"rate_limiter": LIMITER}', 204, POSTBOOT),
    Number("PUT", "/network-interfaces/e0", _MTU_BODY, 68, 65535,
           "Network config error: The MTU 67 is too small: it must be from 68 to 65535.",
           _type_error("u16", 65536, _MTU_BODY), 204, NO_PCI),
    Number("PUT", "/vsock", _CID_BODY, 3, (1 << 32) - 1,
           "Vsock config error: The guest CID 2 is reserved: it must be at least 3.",
           _type_error("u32", 1 << 32, _CID_BODY)),
    _u(32, "PATCH", "/balloon", '{"amount_mib": VALUE}', PREBOOT, f"Balloon update error: {NO_DEVICE}"),
    _u(16, "PATCH", "/balloon/statistics", '{"stats_polling_interval_s": VALUE}', PREBOOT,
       f"Balloon update error: {NO_DEVICE}"),
    Number("PUT", "/hotplug/memory", _TOTAL_BODY, 128, 4294967168,
           f"{_HOTPLUG}Total size must not be lower than slot size (128 MiB)",
           f"{_HOTPLUG}Total size must be a multiple of slot size (128 MiB)"),
    Number("PUT", "/hotplug/memory", _BLOCK_BODY, 2, 2147483648, f"{_HOTPLUG}Block size must not be lower than 2 MiB",
           f"{_HOTPLUG}Block size must be a power of 2"),
    Number("PUT", "/hotplug/memory", _SLOT_BODY, 128, 4294967168,
           f"{_HOTPLUG}Slot size must not be lower than 128 MiB",
           f"{_HOTPLUG}Slot size must be a multiple of block size (2 MiB)"),
    _u(32, "PATCH", "/hotplug/memory", '{"requested_size_mib": VALUE}', PREBOOT,
       f"Memory hotplug update error: {NO_DEVICE}"),
    _u(32, "PUT", "/cpu-config", _FLAGS_BODY),
]  # fmt: skip


def edges(number: Number) -> list[Row]:
    """One row per edge, and one beyond each."""
    rows = []
    for value, outcome in (
        (number.low, number.before),
        (number.high, number.before),
        (number.low - 1, number.below),
        (number.high + 1, number.above),
    ):
        later: Any = number.later
        if isinstance(outcome, str) and outcome.startswith(JSON):
            later = outcome
        kind = VALID if outcome == number.before else RANGE
        body = number.body.replace("VALUE", str(value))
        rows.append(
            Row(number.method, number.path, kind, body, outcome if later is not outcome else later, later, later)
        )
    return rows


#: Rows to be sent one after the other in each state: the table, what keeps the state, the numbers.
ROWS = [*TABLE, *[row for number in NUMBERS for row in edges(number)]]
