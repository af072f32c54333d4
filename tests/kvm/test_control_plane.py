"""Metrics, events and metadata of a real microVM, through the programs as clients start them; not jailed."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.client import Microvm, launch_unjailed, request
from tests.guests.build import build
from tests.metrics_table import EXPECTED


class Stream:
    """A client of GET /events."""

    def __init__(self, path: Path) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(30)
        self.connection.connect(str(path))
        self.connection.sendall(b"GET /events HTTP/1.1\r\n\r\n")
        self.file = self.connection.makefile("rb")
        head = b"".join(iter(self.file.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200 \r\n")
        assert b"Content-Type: application/x-ndjson\r\n" in head

    def until(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return all events up to and including the first that has these fields."""
        events = []
        for line in self.file:
            events.append(json.loads(line))
            if wanted.items() <= events[-1].items():
                return events
        raise AssertionError(f"the stream ended without {wanted}: {events[-3:]}")

    def rest(self) -> list[dict[str, Any]]:
        """Return all events up to the end."""
        return [json.loads(line) for line in self.file]

    def close(self) -> None:
        self.file.close()
        self.connection.close()


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Microvm]:
    metadata = tmp_path / "metadata.json"
    metadata.write_text('{"latest": {"meta-data": {"id": "i-1"}}}')
    arguments = ["--metrics-path", str(tmp_path / "metrics"), "--metadata", str(metadata), "--id", "plane"]
    with launch_unjailed(tmp_path, arguments) as vm:
        vm.wait_for_api()
        yield vm


def start(vm: Microvm) -> None:
    vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))})
    vm.must("PUT", "/actions", {"action_type": "InstanceStart"})


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics").read_text().splitlines()]


@pytest.mark.soak("plane")
def test_events_have_no_gap_over_many_pauses(vm, scale):
    cycles = scale(100, 1_000)
    stream = Stream(vm.api_socket)
    start(vm)
    states = []
    numbers = []
    for _ in range(cycles):
        vm.must("PATCH", "/vm", {"state": "Paused"})
        vm.must("PATCH", "/vm", {"state": "Resumed"})
        for event in stream.until(event="microvm-state", state="Paused") + stream.until(
            event="microvm-state", state="Running"
        ):
            numbers.append(event["number"])
            if event["event"] == "microvm-state":
                states.append(event["state"])
    vm.process.terminate()
    assert vm.wait() == -signal.SIGTERM
    for event in stream.rest():
        numbers.append(event["number"])
        last = event
    stream.close()
    assert (last["event"], last["exit_code"]) == ("ended", 128 + signal.SIGTERM)
    assert numbers == list(range(1, len(numbers) + 1))
    # Started (parked, then running), then as it was asked for.
    assert states == ["Paused", "Running", *["Paused", "Running"] * cycles][: len(states)]
    assert len(states) >= 2 * cycles


def test_a_late_listener_is_told_what_has_happened(vm):
    start(vm)
    stream = Stream(vm.api_socket)
    events = stream.until(event="microvm-state", state="Running")
    stream.close()
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    workers = [event["state"] for event in events if event["event"] == "worker-state"]
    assert workers == ["spawned", "greeted", "configured", "started", "running"]


def test_metrics_are_written_at_the_start_on_demand_and_at_the_end(vm, tmp_path):
    assert metrics(tmp_path) == []
    start(vm)
    (first,) = metrics(tmp_path)
    assert first["put_api_requests"]["boot_source_count"] == 1
    assert first["api_server"]["process_startup_time_us"] > 0
    vm.expect("spinning")
    vm.must("PATCH", "/vm", {"state": "Paused"})
    vm.must("PUT", "/actions", {"action_type": "FlushMetrics"})
    _, second = metrics(tmp_path)
    # The guest may have written before the first line, too: each line has what is new in it.
    assert first["uart"]["write_count"] + second["uart"]["write_count"] == len("spinning\n")
    assert first["vcpu"]["exit_io_out"] + second["vcpu"]["exit_io_out"] == len("spinning\n")
    assert second["latencies_us"]["vmm_pause_vm"] > 0
    assert second["put_api_requests"]["boot_source_count"] == 0
    vm.process.terminate()
    vm.wait()
    *_, third = metrics(tmp_path)
    assert len(metrics(tmp_path)) == 3
    for line in metrics(tmp_path):
        assert line.keys() == EXPECTED.keys() | {"utc_timestamp_ms"}
        assert {group: line[group].keys() for group in EXPECTED} == EXPECTED
    assert third["vmm"]["panic_count"] == third["seccomp"]["num_faults"] == 0


@pytest.mark.parametrize(("number", "key", "code"), [(signal.SIGHUP, "sighup", 156), (signal.SIGXCPU, "sigxcpu", 154)])
def test_the_last_line_names_the_signal_that_ended_the_microvm(vm, tmp_path, number, key, code):
    start(vm)
    vm.process.send_signal(number)
    assert vm.wait() == code
    _, last = metrics(tmp_path)
    assert {name for name, value in last["signals"].items() if value} == {key}


def test_prometheus_and_metadata(vm):
    start(vm)
    assert vm.must("GET", "/mmds") == {"latest": {"meta-data": {"id": "i-1"}}}
    refused = request(vm.api_socket, "PATCH", "/mmds", {"latest": {"meta-data": None, "user-data": "x"}})
    reason = "MMDS error: The MMDS data store is not initialized."
    assert (refused.status, refused.body) == (400, {"fault_message": reason}), "no interface leads to it"
    assert vm.must("GET", "/mmds") == {"latest": {"meta-data": {"id": "i-1"}}}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(vm.api_socket))
        client.sendall(b"GET /metrics/prometheus HTTP/1.1\r\n\r\n")
        head, _, text = client.recv(1 << 20).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 \r\n")
    assert f"Content-Length: {len(text)}".encode() in head
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    for group, keys in EXPECTED.items():
        for key in keys:
            names = [f"cellblock_{group}_{key}{end}" for end in ("", "_min_us", "_max_us", "_sum_us")]
            found = [name for name in names if name in families]
            # Sums over devices are not shown: there is one series per device.
            assert len(found) == (0 if group in ("block", "net", "pmem") else 3 if key.endswith("_agg") else 1), key
    (info,) = families["cellblock_microvm_info"].samples
    assert (info.labels["id"], info.labels["state"]) == ("plane", "Running")
    assert "Successfully added metadata to mmds from file" in vm.tail(100)


def test_devices_to_come_keep_the_microvm_from_starting(vm):
    vm.must("PUT", "/boot-source", {"kernel_image_path": str(build("spin"))})
    vm.must("PUT", "/vsock", {"guest_cid": 3, "uds_path": "v.sock"})
    reply = request(vm.api_socket, "PUT", "/actions", {"action_type": "InstanceStart"})
    assert (reply.status, reply.body) == (
        400, {"fault_message": "Start microvm error: The vsock device is not yet supported."},
    )  # fmt: skip
    assert vm.must("GET", "/")["state"] == "Not started"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "Unable to open or read from the mmds content file: No such file or directory (os error 2)"),
        ("{", "MMDS error: metadata provided not valid json: EOF while parsing an object at line 1 column 1"),
        ('"' + "x" * 100 + '"', "Populating MMDS from file failed: The MMDS patch request doesn't fit."),
    ],
)
def test_metadata_that_is_refused_ends_the_program(tmp_path, content, text):
    path = tmp_path / "metadata.json"
    if content is not None:
        path.write_text(content)
    with launch_unjailed(tmp_path, ["--metadata", str(path), "--mmds-size-limit", "100"]) as vm:
        assert vm.wait() == 1
        assert text in vm.console.decode()
