"""The groups and keys of a line of metrics, as clients check them: written out, not taken from the code."""

from __future__ import annotations

#: Groups and keys as clients check them, written out once more.
EXPECTED = {
    "api_server": {"process_startup_time_us", "process_startup_time_cpu_us"},
    "deprecated_api": {"deprecated_http_api_calls"},
    "get_api_requests": {"instance_info_count", "machine_cfg_count", "mmds_count", "vmm_version_count",
                         "hotplug_memory_count"},
    "i8042": {"error_count", "missed_read_count", "missed_write_count", "read_count", "reset_count", "write_count"},
    "latencies_us": {f"{prefix}{name}" for prefix in ("", "vmm_") for name in (
        "full_create_snapshot", "diff_create_snapshot", "load_snapshot", "pause_vm", "resume_vm")},
    "logger": {"missed_metrics_count", "metrics_fails", "missed_log_count", "rate_limited_log_count"},
    "patch_api_requests": {f"{name}_{what}" for what in ("count", "fails") for name in (
        "drive", "network", "machine_cfg", "mmds", "hotplug_memory", "pmem")},
    "put_api_requests": {f"{name}_{what}" for what in ("count", "fails") for name in (
        "actions", "boot_source", "drive", "logger", "machine_cfg", "cpu_cfg", "metrics", "network", "mmds", "vsock",
        "pmem", "serial", "hotplug_memory")},
    "seccomp": {"num_faults"},
    "vcpu": {"exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write", "failures", "kvmclock_ctrl_fails",
             "exit_io_in_agg", "exit_io_out_agg", "exit_mmio_read_agg", "exit_mmio_write_agg"},
    "vmm": {"panic_count"},
    "uart": {"error_count", "flush_count", "missed_read_count", "missed_write_count", "read_count", "write_count",
             "rate_limiter_dropped_bytes"},
    "signals": {"sigbus", "sigsegv", "sigxfsz", "sigxcpu", "sigpipe", "sighup", "sigill"},
    "interrupts": {"triggers", "config_updates"},
    "balloon": {
        "activate_fails", "inflate_count", "stats_updates_count", "stats_update_fails", "deflate_count", "event_fails",
        "free_page_report_count", "free_page_report_freed", "free_page_report_fails",
        "free_page_hint_count", "free_page_hint_freed", "free_page_hint_fails",
    },
    "block": {
        "activate_fails", "cfg_fails", "no_avail_buffer", "event_fails", "execute_fails", "invalid_reqs_count",
        "flush_count", "queue_event_count", "rate_limiter_event_count", "update_count", "update_fails", "read_bytes",
        "write_bytes", "read_count", "write_count", "rate_limiter_throttled_events", "io_engine_throttled_events",
        "remaining_reqs_count", "read_agg", "write_agg",
    },
    "mmds": {
        "rx_accepted", "rx_accepted_err", "rx_accepted_unusual", "rx_bad_eth", "rx_invalid_token", "rx_no_token",
        "rx_count", "tx_bytes", "tx_count", "tx_errors", "tx_frames", "connections_created", "connections_destroyed",
    },
    "net": {
        "activate_fails", "cfg_fails", "no_rx_avail_buffer", "no_tx_avail_buffer", "event_fails",
        "rx_queue_event_count",
        "rx_event_rate_limiter_count", "rx_rate_limiter_throttled", "rx_tap_event_count", "rx_bytes_count",
        "rx_packets_count", "rx_fails", "rx_count", "tap_read_fails", "tap_write_fails", "tx_bytes_count",
        "tx_malformed_frames", "tx_fails", "tx_count", "tx_packets_count", "tx_queue_event_count",
        "tx_rate_limiter_event_count", "tx_rate_limiter_throttled", "tx_spoofed_mac_count", "tx_remaining_reqs_count",
        "tap_write_agg",
    },
    "vsock": {
        "activate_fails", "cfg_fails", "rx_queue_event_fails", "tx_queue_event_fails", "ev_queue_event_fails",
        "muxer_event_fails", "conn_event_fails", "rx_queue_event_count", "tx_queue_event_count", "rx_bytes_count",
        "tx_bytes_count", "rx_packets_count", "tx_packets_count", "conns_added", "conns_killed", "conns_removed",
        "killq_resync", "tx_flush_fails", "tx_write_fails", "rx_read_fails",
    },
    "entropy": {
        "activate_fails", "entropy_event_fails", "entropy_event_count", "entropy_bytes", "host_rng_fails",
        "entropy_rate_limiter_throttled", "rate_limiter_event_count",
    },
    "pmem": {
        "activate_fails", "cfg_fails", "event_fails", "queue_event_count", "rate_limiter_throttled_events",
        "rate_limiter_event_count",
    },
    "memory_hotplug": {
        "activate_fails", "queue_event_fails", "queue_event_count", "plug_count", "plug_bytes", "plug_fails",
        "plug_agg",
        "unplug_count", "unplug_bytes", "unplug_fails", "unplug_agg", "unplug_discard_fails", "state_count",
        "state_fails", "state_agg", "unplug_all_count", "unplug_all_fails", "unplug_all_agg",
    },
}  # fmt: skip
