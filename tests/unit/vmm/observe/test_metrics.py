"""Metrics: what a line holds, when it is written, what happens to lines that are not taken; and for Prometheus."""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from base.event_manager import EventManager
from tests.metrics_table import EXPECTED
from vmm.api.prometheus import exposition
from vmm.cells.exits import read_exits
from vmm.devices.manager import read_devices
from vmm.observe.logger import Logger
from vmm.observe.metrics import (
    FLUSH_INTERVAL_NS,
    GROUPS,
    SUMMED_KINDS,
    Metrics,
    MetricsConfig,
    MetricsError,
    read_logger,
)


@pytest.fixture
def metrics():
    metrics = Metrics()
    yield metrics
    metrics.close()


@pytest.fixture
def lines(metrics, tmp_path):
    """Configure the metrics; return a function that returns the lines that were written since it was called last."""
    path = tmp_path / "metrics"
    metrics.configure(MetricsConfig(str(path)))
    seen = 0

    def read():
        nonlocal seen
        text = path.read_text()
        new, seen = text[seen:], len(text)
        assert new == "" or new.endswith("\n")
        return [json.loads(line) for line in new.splitlines()]

    return read


def test_a_line_has_exactly_the_groups_and_keys_that_clients_know(metrics, lines):
    assert metrics.flush() is True
    (line,) = lines()
    assert next(iter(line)) == "utc_timestamp_ms"
    assert abs(line.pop("utc_timestamp_ms") - time.time() * 1000) < 10_000
    assert line.keys() == EXPECTED.keys()
    for group, keys in EXPECTED.items():
        assert line[group].keys() == keys, group
    for group in line.values():
        for key, value in group.items():
            expected = {"min_us": 0, "max_us": 0, "sum_us": 0} if key.endswith("_agg") else 0
            assert value == expected, key


def test_an_unknown_key_is_a_mistake(metrics):
    with pytest.raises(KeyError):
        metrics["vcpu"].add("exits")
    with pytest.raises(KeyError):
        metrics["vcpu"].store("exits", 1)
    with pytest.raises(KeyError):
        metrics["rtc"]


def test_incremental_and_stored_counters(metrics, lines):
    metrics["vcpu"].add("failures", 3)
    metrics["latencies_us"].store("pause_vm", 70)
    metrics["vcpu"].observe("exit_io_in_agg", 5)
    metrics["vcpu"].observe("exit_io_in_agg", 3)
    metrics.flush()
    metrics["vcpu"].add("failures")
    metrics["vcpu"].observe("exit_io_in_agg", 10)
    metrics.flush()
    metrics.flush()
    first, second, third = lines()
    assert [line["vcpu"]["failures"] for line in (first, second, third)] == [3, 1, 0]
    assert [line["latencies_us"]["pause_vm"] for line in (first, second, third)] == [70, 70, 70]
    assert first["vcpu"]["exit_io_in_agg"] == {"min_us": 3, "max_us": 5, "sum_us": 8}
    assert second["vcpu"]["exit_io_in_agg"] == {"min_us": 3, "max_us": 10, "sum_us": 10}
    assert third["vcpu"]["exit_io_in_agg"] == {"min_us": 3, "max_us": 10, "sum_us": 0}


@given(st.lists(st.lists(st.integers(0, 1000), max_size=5), max_size=6))
def test_nothing_is_lost_or_counted_twice(batches):
    metrics = Metrics()
    shown = []
    for batch in batches:
        for amount in batch:
            metrics["uart"].add("write_count", amount)
        group = metrics.collect()["uart"]
        shown.append(group.shown()["write_count"])
        group.commit()
    assert shown == [sum(batch) for batch in batches]


def test_devices_have_a_group_each_and_their_sum(metrics, lines):
    metrics.device("block", "rootfs").add("read_bytes", 4096)
    metrics.device("block", "data").add("read_bytes", 512)
    metrics.device("block", "data").observe("read_agg", 7)
    metrics.device("vhost_user_block", "v").store("init_time_us", 9)
    metrics.flush()
    metrics.device("block", "data").add("read_bytes", 1)
    metrics.flush()
    first, second = lines()
    assert first["block_rootfs"]["read_bytes"] == 4096
    assert first["block"]["read_bytes"] == 4608
    assert first["block"]["read_agg"] == {"min_us": 7, "max_us": 7, "sum_us": 7}
    assert first["block"].keys() == first["block_data"].keys()
    assert first["vhost_user_block_v"].keys() == {
        "activate_fails", "cfg_fails", "init_time_us", "activate_time_us", "config_change_time_us",
    }  # fmt: skip
    assert (second["block_rootfs"]["read_bytes"], second["block"]["read_bytes"]) == (0, 1)


def test_id_and_properties_are_repeated_in_every_line(metrics, tmp_path):
    metrics.instance_id = "vm-1"
    metrics.configure(MetricsConfig(str(tmp_path / "m"), emit_id=True, properties={"host": "a", "rack": "ü"}))
    metrics.flush()
    metrics.flush()
    for line in (tmp_path / "m").read_text().splitlines():
        shown = json.loads(line)
        assert (shown["id"], shown["properties"]) == ("vm-1", {"host": "a", "rack": "ü"})


def test_metrics_are_configured_once(metrics, lines, tmp_path):
    with pytest.raises(MetricsError) as error:
        metrics.configure(MetricsConfig(str(tmp_path / "other")))
    assert str(error.value) == (
        "Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed."
    )
    assert not (tmp_path / "other").exists()


def test_a_failed_configuration_can_be_repeated(metrics, tmp_path):
    with pytest.raises(MetricsError, match="No such file or directory"):
        metrics.configure(MetricsConfig("/nix/metrics"))
    assert not metrics.configured
    assert metrics.flush() is False
    metrics.configure(MetricsConfig(str(tmp_path / "m")))
    assert metrics.flush() is True


def test_a_line_that_is_not_taken_is_counted_and_what_it_held_comes_later(metrics, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    metrics.configure(MetricsConfig(fifo))
    metrics["vcpu"].add("failures", 5)
    assert metrics.flush()
    line = json.loads(os.read(reader, 1 << 16))
    assert line["vcpu"]["failures"] == 5
    error = ""
    while not error:  # until the pipe is full
        metrics["vcpu"].add("failures")
        try:
            metrics.flush()
        except MetricsError as raised:
            error = str(raised)
    assert error == "Failed to write metrics: Resource temporarily unavailable (os error 11)"
    text = b""
    while True:
        try:
            text += os.read(reader, 1 << 20)
        except BlockingIOError:
            break
    metrics.flush()  # completes the line that was cut off, before its own
    text += os.read(reader, 1 << 20)
    shown = [json.loads(line) for line in text.splitlines()]
    assert sum(line["vcpu"]["failures"] for line in shown) == metrics["vcpu"].values["failures"] - 5
    assert shown[-1]["logger"]["missed_metrics_count"] == shown[-1]["logger"]["metrics_fails"] == 1
    os.close(reader)


def test_a_line_is_written_every_minute(metrics, lines, monkeypatch):
    now = time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    manager = EventManager()
    manager.add_subscriber(metrics)
    for _ in range(3):
        now += FLUSH_INTERVAL_NS - 1
        manager.run(0)
        assert lines() == []
        now += 1
        manager.run(0)
        assert len(lines()) == 1
    manager.close()


def test_sources_are_read_before_a_line(metrics, lines, tmp_path):
    logger = Logger()
    logger.missed_log_count, logger.rate_limited_log_count = 2, 7
    metrics.sources.append(lambda: read_logger(metrics, logger))
    metrics.flush()
    logger.missed_log_count = 3
    metrics.flush()
    assert [line["logger"]["missed_log_count"] for line in lines()] == [2, 1]


def test_exits_of_all_vcpus_are_added(metrics):
    read_exits(metrics, [tuple(range(10, 26)), tuple(range(16))])
    keys = ("exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write")
    assert [metrics["vcpu"].values[key] for key in keys] == [12, 14, 16, 18]


def test_devices_are_read(metrics):
    class Part:
        error_count, read_count, write_count, reset_count = 1, 2, 3, 4
        flush_count, lost_bytes, rate_limiter_dropped_bytes = 5, 6, 7

    part: Any = Part()
    read_devices(metrics, part, part, part)
    assert metrics["i8042"].values == {
        "error_count": 1, "missed_read_count": 0, "missed_write_count": 0, "read_count": 2, "reset_count": 4,
        "write_count": 3,
    }  # fmt: skip
    assert metrics["uart"].values == {
        "error_count": 0, "flush_count": 5, "missed_read_count": 0, "missed_write_count": 6, "read_count": 2,
        "write_count": 3, "rate_limiter_dropped_bytes": 7,
    }  # fmt: skip


# -- Prometheus -------------------------------------------------------------------------------------------------------

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*\Z")
SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\d+)\Z')


def parse_exposition(text: str) -> dict[str, dict[str, int]]:
    """Return family → labels → value, as the grammar of the format has it; a family comes once and as one block."""
    assert text.endswith("\n")
    families: dict[str, dict[str, int]] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            word, name, kind = line[2:].split(" ")
            assert word == "TYPE"
            assert kind in ("counter", "gauge")
            assert NAME.match(name)
            assert name not in families
            assert name.endswith("_total") == (kind == "counter")
            family = families[name] = {}
            current = name
        else:
            match = SAMPLE.match(line)
            assert match, line
            assert match[1] == current
            assert (match[2] or "") not in family
            family[match[2] or ""] = int(match[3])
    assert all(families.values())
    # And as Prometheus' own library reads it.
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert len(samples) == sum(map(len, families.values()))
    assert {sample.name for sample in samples} == families.keys()
    return families


def test_exposition(metrics):
    metrics.instance_id = 'a"b\\c'
    metrics["uart"].add("write_count", 3)
    metrics["latencies_us"].store("pause_vm", 11)
    metrics["vcpu"].observe("exit_io_in_agg", 4)
    metrics.device("block", "rootfs").add("read_bytes", 5)
    metrics.device("block", "data").add("read_bytes", 6)
    families = parse_exposition(exposition(metrics, "Running"))
    assert families["cellblock_microvm_info"] == {'{id="a\\"b\\\\c",state="Running",version="0.1.0"}': 1}
    assert families["cellblock_uart_write_count_total"] == {"": 3}
    assert families["cellblock_latencies_us_pause_vm"] == {"": 11}
    assert families["cellblock_vcpu_exit_io_in_agg_sum_us_total"] == {"": 4}
    assert families["cellblock_vcpu_exit_io_in_agg_max_us"] == {"": 4}
    assert families["cellblock_block_read_bytes_total"] == {'{id="rootfs"}': 5, '{id="data"}': 6}
    names = {key.lstrip("=~") for group, keys in GROUPS.items() if group not in SUMMED_KINDS for key in keys.split()}
    assert len(families) > len(names)


def test_exposition_shows_totals_whatever_was_flushed(metrics, lines):
    metrics["uart"].add("write_count", 3)
    metrics.flush()
    metrics["uart"].add("write_count", 4)
    assert parse_exposition(exposition(metrics, "Running"))["cellblock_uart_write_count_total"] == {"": 7}
    metrics.flush()
    assert [line["uart"]["write_count"] for line in lines()] == [3, 4]


# -- through the API --------------------------------------------------------------------------------------------------


def test_put_metrics_and_flush(api, kernel, tmp_path):
    path = tmp_path / "metrics"
    body = {"metrics_path": str(path), "emit_id": True, "properties": {"a": "b"}, "unknown": 1}
    assert api.send("PUT", "/metrics", body) == (204, None)
    assert api.fault("PUT", "/metrics", body) == (
        "Metrics error: Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not "
        "allowed."
    )
    api.send("PUT", "/boot-source", {"kernel_image_path": kernel})
    api.send("PUT", "/actions", {"action_type": "InstanceStart"})
    assert api.send("PUT", "/actions", {"action_type": "FlushMetrics"}) == (204, None)
    at_the_start, flushed = map(json.loads, path.read_text().splitlines())
    assert (flushed["id"], flushed["properties"]) == ("test", {"a": "b"})
    assert at_the_start["put_api_requests"]["metrics_count"] == 2
    assert [line["put_api_requests"]["actions_count"] for line in (at_the_start, flushed)] == [1, 1]
    assert api.config()["metrics"] is None


def test_a_flush_that_fails_says_why(running, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    running.metrics.configure(MetricsConfig(fifo))
    flush = {"action_type": "FlushMetrics"}
    while (answer := running.send("PUT", "/actions", flush)) == (204, None):
        pass
    assert answer == (400, {"fault_message": "Internal VMM error: Metrics error: Failed to write metrics: Resource "
                                             "temporarily unavailable (os error 11)"})  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        ("GET", "/", None, "get_api_requests", {"instance_info_count": 1}),
        ("GET", "/version", None, "get_api_requests", {"vmm_version_count": 1}),
        ("GET", "/machine-config", None, "get_api_requests", {"machine_cfg_count": 1}),
        ("GET", "/mmds", None, "get_api_requests", {"mmds_count": 1}),
        ("GET", "/hotplug/memory", None, "get_api_requests", {"hotplug_memory_count": 1}),
        ("PUT", "/mmds", {}, "put_api_requests", {"mmds_count": 1}),
        ("PUT", "/mmds", b"{", "put_api_requests", {"mmds_count": 1, "mmds_fails": 1}),
        ("PUT", "/drives/a", {}, "put_api_requests", {"drive_count": 1, "drive_fails": 1}),
        ("PUT", "/drives", {}, "put_api_requests", {"drive_count": 1, "drive_fails": 1}),
        ("PUT", "/network-interfaces/a", {}, "put_api_requests", {"network_count": 1, "network_fails": 1}),
        ("PUT", "/hotplug/memory", {"total_size_mib": 128}, "put_api_requests", {"hotplug_memory_count": 1}),
        ("PUT", "/cpu-config", {}, "put_api_requests", {"cpu_cfg_count": 1}),
        ("PUT", "/logger", {"level": 1}, "put_api_requests", {"logger_count": 1, "logger_fails": 1}),
        ("PATCH", "/machine-config", {}, "patch_api_requests", {"machine_cfg_count": 1, "machine_cfg_fails": 1}),
        ("PATCH", "/mmds", {}, "patch_api_requests", {"mmds_count": 1}),
        ("PATCH", "/vm", {}, "patch_api_requests", {}),
        ("PUT", "/foo", {}, "put_api_requests", {}),
        ("DELETE", "/drives/a", None, "patch_api_requests", {}),
    ],
)
def test_requests_are_counted(api, case):
    method, path, body, group, counted = case
    api.send(method, path, body)
    for name in ("get_api_requests", "put_api_requests", "patch_api_requests"):
        found = {key: value for key, value in api.metrics[name].values.items() if value}
        assert found == (counted if name == group else {})


def test_latencies_of_pause_and_resume(running):
    running.send("PATCH", "/vm", {"state": "Paused"})
    shown = running.metrics["latencies_us"].values
    assert shown["pause_vm"] >= shown["vmm_pause_vm"] >= 0
    assert shown["pause_vm"] > 0
    assert shown["resume_vm"] == 0


def test_prometheus_endpoint(running):
    head, _, body = running.raw("GET", "/metrics/prometheus").partition(b"\r\n\r\n")
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in head
    families = parse_exposition(body.decode())
    assert families["cellblock_put_api_requests_boot_source_count_total"] == {"": 1}
    assert families["cellblock_microvm_info"] == {'{id="test",state="Running",version="0.1.0"}': 1}
