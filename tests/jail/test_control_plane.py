"""The control plane inside the jail: nothing is imported late, and files appear where clients look for them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from tests.harness.jail import GID, UID, JailedMicrovm, microvm

BUCKET = {"size": 1, "refill_time": 1, "one_time_burst": 1}
LIMITER = {"bandwidth": BUCKET, "ops": BUCKET}
#: Every request that a jailed controller is asked once, before and after the start.
REQUESTS: list[tuple[str, str, Any]] = [
    ("PUT", "/logger", {"level": "Debug"}),
    ("PUT", "/serial", {"rate_limiter": BUCKET}),
    ("PUT", "/drives/a", {"drive_id": "a", "is_root_device": True, "path_on_host": "/nix", "rate_limiter": LIMITER}),
    ("PATCH", "/drives/a", {"drive_id": "a", "path_on_host": "/nix"}),
    ("DELETE", "/drives/a", None),
    ("PUT", "/pmem/a", {"id": "a", "path_on_host": 1}),
    ("PATCH", "/pmem/a", {"id": "a", "rate_limiter": LIMITER}),
    ("PUT", "/network-interfaces/a", {"iface_id": "a", "host_dev_name": "t", "guest_mac": "x"}),
    ("PATCH", "/network-interfaces/a", {"iface_id": "a"}),
    ("PUT", "/vsock", {"guest_cid": 1, "uds_path": "v", "vsock_id": "v"}),
    ("PUT", "/entropy", {"rate_limiter": 1}),
    ("PUT", "/balloon", {"amount_mib": 1000000, "deflate_on_oom": True}),
    ("GET", "/balloon", None),
    ("GET", "/balloon/statistics", None),
    ("PATCH", "/balloon/hinting/start", None),
    ("PUT", "/hotplug/memory", {"total_size_mib": 1}),
    ("PATCH", "/hotplug/memory", {"requested_size_mib": 1}),
    ("GET", "/hotplug/memory", None),
    ("PUT", "/cpu-config", {"msr_modifiers": [{"addr": "0x1", "bitmap": "0b2"}]}),
    ("PUT", "/mmds", {"b": [1, 2.5, None], "a": {"c": "ü"}}),
    ("PATCH", "/mmds", {"a": None}),
    ("GET", "/mmds", None),
    ("PUT", "/mmds/config", {"network_interfaces": []}),
    ("PUT", "/snapshot/create", {"snapshot_path": "s", "mem_file_path": "m"}),
    ("PUT", "/snapshot/load", {"snapshot_path": "s", "mem_file_path": "m"}),
    ("GET", "/vm/config", None),
    ("PUT", "/actions", {"action_type": "FlushMetrics"}),
]


def _exchange(jailed: JailedMicrovm, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(jailed.api_socket))
        client.sendall(request)
        return client.recv(1 << 20)


def _ask_everything(jailed: JailedMicrovm) -> None:
    for method, target, body in REQUESTS:
        reply = jailed.api(method, target, body)
        text = json.dumps(reply.body)
        assert reply.status in (200, 204, 400), (method, target, text)
        assert "unexpected" not in text, (method, target, text)
    assert _exchange(jailed, b"GET /metrics/prometheus HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 \r\n")
    events = _exchange(jailed, b"GET /events HTTP/1.1\r\n\r\n")
    assert events.startswith(b"HTTP/1.1 200 \r\n")


def test_every_request_is_answered_inside_the_jail(base: Path) -> None:
    with microvm(base) as jailed:
        jailed.add_guest("spin")
        jailed.start().wait_up()
        assert jailed.api("PUT", "/metrics", {"metrics_path": "/metrics", "emit_id": True}).status == 204
        _ask_everything(jailed)
        jailed.boot()
        _ask_everything(jailed)
        assert jailed.api("PATCH", "/vm", {"state": "Paused"}).status == 204
        _ask_everything(jailed)
        jailed.stop()
        path = jailed.root / "metrics"
        assert (path.stat().st_uid, path.stat().st_gid) == (UID, GID)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    # At the start, twice on demand, at the end.
    assert len(lines) == 4
    assert {line["id"] for line in lines} == {jailed.id}
    assert sum(line["put_api_requests"]["drive_count"] for line in lines) == 3
    assert lines[-1]["seccomp"]["num_faults"] == 0


def test_metrics_and_metadata_of_the_command_line_are_files_of_the_jail(base: Path) -> None:
    arguments = ("--metrics-path", "/m/metrics", "--metadata", "/m/data.json", "--exerciser")
    with microvm(base, arguments=arguments) as jailed:
        directory = jailed.root / "m"
        directory.mkdir(parents=True)
        os.chown(directory, UID, GID)
        (directory / "data.json").write_text('{"a": 1}')
        jailed.add_guest("spin")
        jailed.start().wait_up()
        assert jailed.api("GET", "/mmds").body == {"a": 1}
        assert (directory / "metrics").read_text() == ""
        jailed.boot()
        assert len((directory / "metrics").read_text().splitlines()) == 1
        jailed.stop()
