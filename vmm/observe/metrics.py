"""Metrics: counters in the groups that Firecracker's clients know, written as one JSON object per line.

docs/formats/metrics.md lists what each group holds. A counter is *incremental* (a line shows what was added since the
line before) or *stored* (a line shows the value as it is). What other parts count anyway is read from them by *sources*
just before a line is made, so that nothing is counted twice on fast paths.
"""

from __future__ import annotations

import os
import time

from base.counters import Counters
from base.errno_text import errno_text
from base.lean_typing import TYPE_CHECKING, NamedTuple
from vmm.cli import DEFAULT_INSTANCE_ID
from vmm.errors import VmmError
from vmm.files import FileOpenError, open_output
from vmm.json.schema import BOOLEAN, PATH, STRING_MAP, Field, Object, Option
from vmm.json.text import json_text

if TYPE_CHECKING:
    from base.event_manager import EventOps, Events
    from base.lean_typing import Callable, Iterator
    from vmm.json.text import JsonValue
    from vmm.observe.logger import Logger

#: A line is written at least this often while a microVM runs.
FLUSH_INTERVAL_NS = 60_000_000_000

_LATENCIES = "full_create_snapshot diff_create_snapshot load_snapshot pause_vm resume_vm"
_BLOCK = (
    "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count "
    "queue_event_count rate_limiter_event_count update_count update_fails read_bytes write_bytes read_count "
    "write_count rate_limiter_throttled_events io_engine_throttled_events remaining_reqs_count ~read_agg ~write_agg"
)
_NET = (
    "activate_fails cfg_fails no_rx_avail_buffer no_tx_avail_buffer event_fails rx_queue_event_count "
    "rx_event_rate_limiter_count rx_rate_limiter_throttled rx_tap_event_count rx_bytes_count rx_packets_count rx_fails "
    "rx_count tap_read_fails tap_write_fails tx_bytes_count tx_malformed_frames tx_fails tx_count tx_packets_count "
    "tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled tx_spoofed_mac_count "
    "tx_remaining_reqs_count ~tap_write_agg"
)
_PMEM = "activate_fails cfg_fails event_fails queue_event_count rate_limiter_throttled_events rate_limiter_event_count"
#: Keys of every group. ``=`` marks a stored value, ``~`` an aggregate of latencies, ``*`` expands to _count and _fails.
GROUPS = {
    "api_server": "=process_startup_time_us =process_startup_time_cpu_us",
    "balloon": (
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails "
        "free_page_report_count free_page_report_freed free_page_report_fails "
        "free_page_hint_count free_page_hint_freed free_page_hint_fails"
    ),
    "block": _BLOCK,
    "deprecated_api": "deprecated_http_api_calls",
    "get_api_requests": "instance_info_count machine_cfg_count mmds_count vmm_version_count hotplug_memory_count",
    "i8042": "error_count missed_read_count missed_write_count read_count reset_count write_count",
    "latencies_us": " ".join([f"={vmm}{name}" for vmm in ("", "vmm_") for name in _LATENCIES.split()]),
    "logger": "missed_metrics_count metrics_fails missed_log_count rate_limited_log_count",
    "mmds": (
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token rx_count tx_bytes "
        "tx_count tx_errors tx_frames connections_created connections_destroyed"
    ),
    "net": _NET,
    "patch_api_requests": "*drive *network *machine_cfg *mmds *hotplug_memory *pmem",
    "put_api_requests": (
        "*actions *boot_source *drive *logger *machine_cfg *cpu_cfg *metrics *network *mmds *vsock *pmem *serial "
        "*hotplug_memory"
    ),
    "seccomp": "num_faults",
    "vcpu": (
        "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures kvmclock_ctrl_fails "
        "~exit_io_in_agg ~exit_io_out_agg ~exit_mmio_read_agg ~exit_mmio_write_agg"
    ),
    "vmm": "=panic_count",
    "uart": (
        "error_count flush_count missed_read_count missed_write_count read_count write_count rate_limiter_dropped_bytes"
    ),
    "signals": "=sigbus =sigsegv =sigxfsz =sigxcpu sigpipe =sighup =sigill",
    "vsock": (
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails muxer_event_fails "
        "conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count tx_bytes_count rx_packets_count "
        "tx_packets_count conns_added conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails "
        "rx_read_fails"
    ),
    "entropy": (
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails "
        "entropy_rate_limiter_throttled rate_limiter_event_count"
    ),
    "interrupts": "triggers config_updates",
    "pmem": _PMEM,
    "memory_hotplug": (
        "activate_fails queue_event_fails queue_event_count plug_count plug_bytes plug_fails ~plug_agg "
        "unplug_count unplug_bytes unplug_fails ~unplug_agg unplug_discard_fails "
        "state_count state_fails ~state_agg unplug_all_count unplug_all_fails ~unplug_all_agg"
    ),
}
#: Kinds of devices that have a group each, named KIND_ID, beside the group KIND with the sum of all.
SUMMED_KINDS = ("block", "net", "pmem")
VHOST_USER_BLOCK = "vhost_user_block"
_DEVICE_KEYS = {
    "block": _BLOCK,
    "net": _NET,
    "pmem": _PMEM,
    VHOST_USER_BLOCK: "activate_fails cfg_fails =init_time_us =activate_time_us =config_change_time_us",
}
#: The exit code that a signal stands for (base.exit_codes) → the key of the group ``signals``.
SIGNAL_KEYS = {149: "sigbus", 150: "sigsegv", 151: "sigxfsz", 154: "sigxcpu", 156: "sighup", 157: "sigill"}


class MetricsError(VmmError):
    """Metrics cannot be set up, or a line could not be written."""

    code = "vmm.metrics"


class MetricsConfig(NamedTuple):
    """Body of PUT /metrics. ``emit_id`` and ``properties`` are repeated in every line."""

    metrics_path: str
    emit_id: bool = False
    properties: dict[str, str] | None = None


METRICS_CONFIG = Object(
    "MetricsConfig",
    MetricsConfig,
    Field("metrics_path", PATH),
    Field("emit_id", BOOLEAN, False),
    Field("properties", Option(STRING_MAP)),
    ignore_unknown=True,
)


class _Target:
    """The file or FIFO. What a FIFO takes only in part is completed before the next line."""

    __slots__ = ("_fd", "_rest")

    def __init__(self, path: str) -> None:
        self._fd = open_output(path)
        self._rest = b""

    def write(self, line: bytes) -> None:
        """Write a line, or raise OSError when nothing of it was taken."""
        if self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]
            if self._rest:
                raise BlockingIOError(11, "")
        self._rest = line[os.write(self._fd, line) :]

    def close(self) -> None:
        os.close(self._fd)


class Metrics:
    """All groups, and where lines go. ``METRICS`` is the one that the controller uses.

    A subscriber of the event loop: while it is one, a line is written every ``FLUSH_INTERVAL_NS``.
    """

    def __init__(self) -> None:
        self.instance_id = DEFAULT_INSTANCE_ID
        self._groups = {name: Counters(keys) for name, keys in GROUPS.items()}
        self._devices: dict[tuple[str, str], Counters] = {}
        #: Called before a line is made, to read counters that others keep.
        self.sources: list[Callable[[], None]] = []
        self._target: _Target | None = None
        self._head: dict[str, JsonValue] = {}

    def __getitem__(self, name: str) -> Counters:
        """Return a group; KeyError for one that does not exist."""
        return self._groups[name]

    @property
    def configured(self) -> bool:
        """Whether lines are written anywhere."""
        return self._target is not None

    def device(self, kind: str, device_id: str) -> Counters:
        """Return the group of one device; made when it is asked for first."""
        group = self._devices.get((kind, device_id))
        if group is None:
            group = self._devices[kind, device_id] = Counters(_DEVICE_KEYS[kind])
        return group

    def group_names(self) -> tuple[str, ...]:
        """Return the names of the groups that every line has."""
        return tuple(self._groups)

    def devices(self) -> Iterator[tuple[str, str, Counters]]:
        """Iterate over kind, id and group of all devices."""
        for (kind, device_id), group in self._devices.items():
            yield kind, device_id, group

    def configure(self, config: MetricsConfig) -> None:
        """Open the file or FIFO for lines; possible once. Raises MetricsError, and then nothing has changed."""
        prefix = "Cannot initialize the metrics system due to bad user input: "
        if self._target is not None:
            raise MetricsError(f"{prefix}Reinitialization of metrics not allowed.")
        try:
            self._target = _Target(config.metrics_path)
        except FileOpenError as error:
            raise MetricsError(f"{prefix}{error}") from error
        if config.emit_id:
            self._head["id"] = self.instance_id
        if config.properties is not None:
            self._head["properties"] = dict(config.properties)

    def collect(self) -> dict[str, Counters]:
        """Bring all counters up to date and return the groups in the order of the line."""
        for source in self.sources:
            source()
        groups = dict(self._groups)
        for kind in SUMMED_KINDS:
            groups[kind].clear()
        for (kind, device_id), group in self._devices.items():
            groups[f"{kind}_{device_id}"] = group
            if kind in SUMMED_KINDS:
                groups[kind].merge(group)
        return groups

    def flush(self) -> bool:
        """Write a line; False when metrics are not configured. Raises MetricsError; what was counted is not lost."""
        if self._target is None:
            return False
        groups = self.collect()
        line: dict[str, JsonValue] = {"utc_timestamp_ms": time.time_ns() // 1_000_000, **self._head}
        for name, group in groups.items():
            line[name] = group.shown()
        try:
            self._target.write(f"{json_text(line)}\n".encode(errors="backslashreplace"))
        except OSError as error:
            logger = self._groups["logger"]
            logger.add("missed_metrics_count")
            logger.add("metrics_fails")
            raise MetricsError(f"Failed to write metrics: {errno_text(error)}") from error
        for group in groups.values():
            group.commit()
        return True

    def try_flush(self) -> None:
        """Write a line if that is possible; one that is lost was counted."""
        try:
            self.flush()
        except MetricsError:
            pass

    def close(self) -> None:
        """Close the file. Metrics can be configured again."""
        if self._target is not None:
            self._target.close()
            self._target = None
        self._head.clear()

    # -- EventSubscriber ----------------------------------------------------------------------------------------------

    def init(self, ops: EventOps) -> None:
        """Begin to write a line every ``FLUSH_INTERVAL_NS``."""
        ops.add_timer(time.monotonic_ns() + FLUSH_INTERVAL_NS, lambda: self._periodic(ops))

    def process(self, events: Events, ops: EventOps) -> None:
        """Nothing is watched here but time."""

    def _periodic(self, ops: EventOps) -> None:
        self.try_flush()
        ops.add_timer(time.monotonic_ns() + FLUSH_INTERVAL_NS, lambda: self._periodic(ops))


#: The controller's metrics.
METRICS = Metrics()


def read_logger(metrics: Metrics, logger: Logger) -> None:
    """Take over the log's loss counters."""
    group = metrics["logger"]
    group.store("missed_log_count", logger.missed_log_count)
    group.store("rate_limited_log_count", logger.rate_limited_log_count)
